"""Between connections and app, with connections that a test plays."""

import asyncio
import io
import json
import threading
import time
from types import SimpleNamespace

import pytest

from deploy.server import bridge
from deploy.server.bridge import Bridge
from deploy.server.request_context import HEADERS

LONGEST = 200_000


@pytest.fixture(autouse=True)
def quick_sweep(monkeypatch):
    monkeypatch.setattr(bridge, "_SWEEP_EVERY", 0.01)


def scope(*headers, host="10.0.0.1", method="POST"):
    return SimpleNamespace(
        method=method,
        path="/v1/predict",
        query_string="a=b",
        client=f"{host}:40000",
        scheme="http",
        server="127.0.0.1:8000",
        http_version="1.1",
        headers=dict_of(headers),
    )


def dict_of(pairs):
    return SimpleNamespace(items=lambda: list(pairs))


class Channel:
    """Sends parts of a body; None among them is a client that says nothing more."""

    def __init__(self, *parts):
        self.parts = parts
        self.taken = 0
        self.status = self.body = None
        self.headers = {}

    async def __aiter__(self):
        for part in self.parts:
            if part is None:
                await asyncio.Event().wait()
            self.taken += 1
            await asyncio.sleep(0)
            yield part

    async def __call__(self):
        return b"".join([part async for part in self])

    def response_bytes(self, status, headers, body):
        assert self.status is None, "answered twice"
        self.status, self.headers, self.body = status, dict(headers), body

    @property
    def problem(self):
        assert self.headers["content-type"] == "application/problem+json"
        said = json.loads(self.body)
        assert said["status"] == self.status
        assert said["request_id"] == self.headers["x-request-id"]
        assert dict(HEADERS).items() <= self.headers.items()
        return said


class App:
    """Keeps what it was asked, and answers it; waits while `gate` is closed."""

    def __init__(self):
        self.asked = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = 0
        self.error = None

    def __call__(self, environ, start_response):
        self.asked.append({**environ, "body": environ["wsgi.input"].read()})
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        start_response("201 Created", [("X-Said", "it")])
        return Parts(self)


class Parts(list):
    def __init__(self, app):
        super().__init__([b"o", b"k"])
        self._app = app

    def close(self):
        self._app.closed += 1


def served(app, play, **options):
    """Runs `play(bridge)` on a loop of its own, between the beginning and the end of a server."""
    ends = []
    made = Bridge(app, longest_body=LONGEST, on_end=lambda: ends.append(1), **options)

    async def run():
        loop = asyncio.get_running_loop()
        made.__rsgi_init__(loop)
        try:
            await play(made)
        finally:
            made.__rsgi_del__(loop)

    asyncio.run(run())
    assert ends == [1]


def length(n):
    return ("content-length", str(n))


def ask(*parts, headers=(), **options):
    app, channel = App(), Channel(*parts)
    served(app, lambda made: made.__rsgi__(scope(*headers), channel), **options)
    return app, channel


def test_a_request_becomes_what_pep_3333_asks_for():
    headers = [("content-type", "image/png"), length(4), ("accept", "a"), ("accept", "b"), ("x-request-id", "1")]
    app, channel = ask(b"ab", b"cd", headers=headers)
    (asked,) = app.asked
    assert (channel.status, channel.headers, channel.body) == (201, {"X-Said": "it"}, b"ok")
    assert app.closed == 1
    expected = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/v1/predict",
        "QUERY_STRING": "a=b",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "REMOTE_ADDR": "10.0.0.1",
        "CONTENT_TYPE": "image/png",
        "CONTENT_LENGTH": "4",
        "HTTP_ACCEPT": "a,b",
        "HTTP_X_REQUEST_ID": "1",
        "body": b"abcd",
    }
    assert {name: asked[name] for name in expected} == expected
    assert isinstance(asked["wsgi.input"], io.BytesIO)


def test_an_address_of_the_new_kind_is_named_without_brackets():
    app, channel = App(), Channel()
    served(app, lambda made: made.__rsgi__(scope(host="[::1]", method="GET"), channel))
    assert app.asked[0]["REMOTE_ADDR"] == "::1"


def test_a_request_without_a_body_has_an_empty_one_and_no_length():
    app, channel = ask()
    assert (channel.status, app.asked[0]["body"]) == (201, b"")
    assert "CONTENT_LENGTH" not in app.asked[0]


def test_a_body_in_chunks_gets_its_length():
    app, _ = ask(b"ab", b"c", headers=[("transfer-encoding", "chunked")])
    assert (app.asked[0]["body"], app.asked[0]["CONTENT_LENGTH"]) == (b"abc", "3")


def test_a_long_body_arrives_whole():
    app, _ = ask(*[b"x" * 50_000] * 4, headers=[length(LONGEST)])
    assert app.asked[0]["body"] == b"x" * LONGEST


def test_of_a_body_declared_too_long_nothing_is_read():
    app, channel = ask(b"x", headers=[length(LONGEST + 1)])
    assert (app.asked[0]["body"], app.asked[0]["CONTENT_LENGTH"]) == (b"", str(LONGEST + 1))
    assert channel.taken == 0


def test_a_body_that_turns_out_too_long_is_cut_off_where_the_app_can_tell():
    app, channel = ask(*[b"x" * 60_000] * 100, headers=[("transfer-encoding", "chunked")])
    assert len(app.asked[0]["body"]) == LONGEST + 1
    assert channel.taken == 4


@pytest.mark.parametrize("header", [length(10), length(100_000), ("transfer-encoding", "chunked")])
def test_a_body_that_does_not_come_in_time_is_refused(header):
    began = time.monotonic()
    app, channel = ask(b"x", None, headers=[header], body_seconds=0.05)
    assert 0.05 <= time.monotonic() - began < 2
    assert (channel.status, channel.problem["title"]) == (408, "Request Timeout")
    assert app.asked == []


def test_a_client_that_goes_while_its_body_is_read_is_no_slow_one():
    app, channel = App(), Channel(b"x", None)

    async def play(made):
        task = asyncio.ensure_future(made.__rsgi__(scope(length(10)), channel))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    served(app, play)
    assert (channel.status, app.asked) == (None, [])


async def _until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


def test_one_address_gets_half_of_the_turns_and_others_the_rest():
    app = App()
    app.gate.clear()
    asked = [Channel() for _ in range(6)]
    other, late = Channel(), Channel()

    async def play(made):
        tasks = [asyncio.ensure_future(made.__rsgi__(scope(), channel)) for channel in asked]
        await _until(lambda: len(app.asked) == 4)
        tasks.append(asyncio.ensure_future(made.__rsgi__(scope(host="10.0.0.2"), other)))
        await _until(lambda: len(app.asked) == 5)
        app.gate.set()
        await asyncio.gather(*tasks)
        await made.__rsgi__(scope(), late)

    refused = []
    served(app, play, capacity=8, on_refusal=refused.append)
    assert [channel.status for channel in asked] == [201] * 4 + [503] * 2
    assert refused == [503] * 2
    assert asked[-1].headers["retry-after"] == "1"
    assert "busy" in asked[-1].problem["detail"]
    assert (other.status, late.status) == (201, 201)


def test_slow_bodies_take_nobodys_turn():
    app, good = App(), [Channel(b"x") for _ in range(4)]
    slow = [Channel(b"x", None) for _ in range(50)]

    async def play(made):
        tasks = [asyncio.ensure_future(made.__rsgi__(scope(length(10)), channel)) for channel in slow]
        await _until(lambda: all(channel.taken for channel in slow))
        for channel in good:
            await made.__rsgi__(scope(length(1)), channel)
        await asyncio.gather(*tasks)

    served(app, play, capacity=2, body_seconds=0.2)
    assert [channel.status for channel in good] == [201] * 4
    assert {channel.status for channel in slow} == {408}


def test_the_memory_for_bodies_is_bounded_and_given_back():
    app = App()
    large = [b"x" * 50_000] * 3
    held = [Channel(*large, None) for _ in range(4)]
    late, small = Channel(*large), Channel(b"x")

    async def play(made):
        tasks = [asyncio.ensure_future(made.__rsgi__(scope(length(LONGEST)), channel)) for channel in held]
        await _until(lambda: sum(channel.status == 503 for channel in held) == 2)
        await made.__rsgi__(scope(length(1)), small)
        await asyncio.gather(*tasks)
        for _ in range(3):  # what the slow ones and this one held is free again
            again = Channel(*large)
            await made.__rsgi__(scope(length(150_000)), again)
            assert again.status == 201
        await made.__rsgi__(scope(length(150_000), host="10.0.0.2"), late)

    served(app, play, body_bytes=650_000, body_seconds=0.2)
    assert sorted(channel.status for channel in held) == [408, 408, 503, 503]
    assert (small.status, late.status) == (201, 201)


def test_an_app_that_raises_is_told_in_the_log_and_not_to_the_client(caplog):
    app, channel = App(), Channel()
    app.error = ValueError("secret")
    served(app, lambda made: made.__rsgi__(scope(), channel))
    assert (channel.status, channel.problem["title"]) == (500, "The server failed")
    assert b"secret" not in channel.body
    assert "secret" in caplog.text


def test_the_reply_for_a_client_that_has_gone_is_dropped():
    app, gone, after = App(), Channel(), Channel()
    app.gate.clear()

    async def play(made):
        task = asyncio.ensure_future(made.__rsgi__(scope(), gone))
        await _until(lambda: app.asked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        app.gate.set()
        await made.__rsgi__(scope(), after)

    served(app, play, capacity=2)
    assert (gone.status, after.status) == (None, 201)


def test_threads_are_as_many_as_work_together_and_end_with_the_server():
    app = App()
    app.gate.clear()
    channels = [Channel() for _ in range(3)]
    before = set(threading.enumerate())

    def own():
        return [thread for thread in threading.enumerate() if thread not in before]

    async def play(made):
        tasks = [asyncio.ensure_future(made.__rsgi__(scope(host=f"10.0.0.{i}"), c)) for i, c in enumerate(channels)]
        await _until(lambda: len(app.asked) == 2)
        assert len(own()) == 2
        app.gate.set()
        await asyncio.gather(*tasks)
        for _ in range(5):
            await made.__rsgi__(scope(), Channel())
        assert len(own()) == 2

    served(app, play, threads=2)
    assert [channel.status for channel in channels] == [201] * 3
    for thread in own():
        thread.join(5)
    assert own() == []
