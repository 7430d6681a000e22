"""The fast path answers as the app would, and leaves to the app what it would answer otherwise."""

import asyncio
import json
import logging
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from deploy.server.app import FAST_PATH, METRICS
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.bridge import Bridge
from ml.errors import ModelInvalid
from ml.settings import Settings
from ml.traffic import Traffic
from tests.served_app import OTHER, PIXELS, Served, encoded

PNG = encoded()
KEY = "a-key-of-sixteen-bytes"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes apps with a champion, and ends their threads."""
    made = []

    def one(settings, **changes):
        made.append(Served(tmp_path_factory.mktemp("served"), settings.model_copy(update=changes)))
        made[-1].follower.poll()
        return made[-1]

    yield one
    for served in made:
        batcher_of(served).close()


@pytest.fixture
def served(make, settings):
    return make(settings)


def batcher_of(served):
    return served.app.extensions[FAST_PATH]._batcher


class Channel:
    def __init__(self, body):
        self.body, self.thread, self.replies = body, None, []

    async def __call__(self):
        return self.body

    async def __aiter__(self):
        yield self.body

    def response_bytes(self, status, headers, body):
        self.thread = threading.current_thread().name
        self.replies.append((status, headers, body))


def scope(body, **more):
    headers = {"host": "127.0.0.1:8000", "content-type": "image/png", "content-length": str(len(body))}
    headers |= more.pop("headers", {})
    asked = {
        "method": "POST",
        "path": "/v1/predict",
        "query_string": "",
        "client": "127.0.0.1:40000",
        "scheme": "http",
        "server": "127.0.0.1:8000",
        "http_version": "1.1",
        **more,
    }
    pairs = [(name, value) for name, value in headers.items() if value is not None]
    return SimpleNamespace(**asked, headers=SimpleNamespace(items=lambda: pairs))


def asked_all(served, requests, *, fast=True):
    """Sends (scope, body) all at once; their channels."""
    path = served.app.extensions[FAST_PATH] if fast else None
    bridge = Bridge(served.app, longest_body=MAX_BODY_BYTES, fast_path=path)
    channels = [Channel(body) for _, body in requests]

    async def run():
        loop = asyncio.get_running_loop()
        bridge.__rsgi_init__(loop)
        try:
            answering = [
                bridge.__rsgi__(asked, channel) for (asked, _), channel in zip(requests, channels, strict=True)
            ]
            await asyncio.wait_for(asyncio.gather(*answering), 20)
        finally:
            bridge.__rsgi_del__(loop)

    asyncio.run(run())
    for channel in channels:
        assert len(channel.replies) == 1, "answered once"
    return channels


def asked(served, body=PNG, *, fast=True, **more):
    (channel,) = asked_all(served, [(scope(body, **more), body)], fast=fast)
    return channel


def is_fast(channel):
    return channel.thread.startswith("predict-")


def said(channel):
    """A reply without what differs between two answers to the same question."""
    status, headers, body = channel.replies[0]
    identity = dict(headers)["X-Request-ID"]
    text = body.decode().replace(identity, "ID")
    headers = sorted((name.lower(), value.replace(identity, "ID")) for name, value in headers)
    return status, headers, text


@contextmanager
def failing(served, monkeypatch, error):
    def predict(*_, **__):
        raise error

    monkeypatch.setattr(served.follower.current().engine, "predict", predict)
    yield


def lines(caplog):
    return [record.fields for record in caplog.records if record.name == "deploy.server.access"]


def figure(served, name, **labels):
    registry = served.app.extensions[METRICS]._registry
    return registry.get_sample_value(name, labels) or 0


def test_a_plain_png_is_answered_by_the_thread_that_predicted_it(served, caplog):
    caplog.set_level(logging.INFO)
    identity = str(uuid4())
    channel = asked(served, headers={"x-request-id": identity})
    assert is_fast(channel)
    status, headers, body = channel.replies[0]
    assert (status, dict(headers)["X-Request-ID"]) == (200, identity)
    (kept,) = served.log.predictions
    assert str(kept.request_id) == identity
    np.testing.assert_array_equal(kept.images, PIXELS[None])
    answer = json.loads(body)
    assert answer["predictions"][0]["class_id"] == kept.probabilities[0].argmax()
    (line,) = lines(caplog)
    assert (line["request_id"], line["status"], line["images"], line["bytes"]) == (identity, 200, 1, len(PNG))
    assert {"decode_ms", "predict_ms", "queue_ms", "engine_ms", "log_ms"} <= line.keys()
    assert figure(served, "cifar10_http_requests_total", route="/v1/predict", method="POST", status="200") == 1
    assert figure(served, "cifar10_batch_images_count") == 1


def test_many_at_once_get_their_own_answers(served):
    images = [np.roll(PIXELS, n, axis=0) for n in range(32)] + [np.roll(OTHER, n, axis=1) for n in range(32)]
    bodies = [encoded(image) for image in images]
    channels = asked_all(served, [(scope(body), body) for body in bodies])
    assert all(is_fast(channel) for channel in channels)
    expected = served.follower.current().engine.predict(np.stack(images))
    for channel, row in zip(channels, expected, strict=True):
        probabilities = json.loads(channel.replies[0][2])["predictions"][0]["probabilities"]
        np.testing.assert_allclose(list(probabilities.values()), row, atol=1e-6)
    assert len(served.log.predictions) == 64


BODIES = {
    "plain": PNG,
    "text chunk": PNG[:33] + b"\x00\x00\x00\x03tEXta\x00b\xdcI\xa2;" + PNG[33:],
    "grey": encoded(PIXELS[..., 0]),
    "larger": encoded(np.zeros((64, 48, 3), np.uint8)),
    "jpeg": encoded(kind="JPEG"),
    "cut": PNG[:-20],
    "flipped": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
    "empty": b"",
    "text": b"hello",
    "long": PNG + b"\x00" * 70_000,
}
HEADERS = {
    "content-type": ["image/png", "image/jpeg", "IMAGE/PNG", "image/png; a=b", "text/plain", None],
    "content-encoding": ["identity", "gzip", None],
    "x-request-id": ["7f1b0c6e-0c1f-4f6c-9d3e-0f2a4c7d9b11", "no uuid", None],
    "origin": ["http://evil.example", "http://127.0.0.1:8000", None],
    "x-forwarded-for": ["10.0.0.1", None],
    "host": ["127.0.0.1:8000", "evil.example"],
    "authorization": [f"Bearer {KEY}", "Bearer wrong", None],
}


@pytest.fixture(scope="module")
def pair(make):
    """Without keys, and with one."""
    plain = Settings(_env_file=None)
    return [make(plain), make(plain, prediction_api_keys=(SecretStr(KEY),))]


@st.composite
def anything(draw):
    """A body and the rest of a request, of which each part may be what the fast path takes or not."""
    return BODIES[draw(st.sampled_from(sorted(BODIES)))], {
        "headers": {name: draw(st.sampled_from(values)) for name, values in HEADERS.items()},
        "query_string": draw(st.sampled_from(["", "", "include=image", "a=b"])),
        "method": draw(st.sampled_from(["POST", "POST", "POST", "GET", "OPTIONS"])),
        "path": draw(st.sampled_from(["/v1/predict", "/v1/predict", "/v1/predict/", "//v1/predict", "/invocations"])),
    }


@given(keyed=st.booleans(), request=anything())
@hypothesis.settings(max_examples=300, deadline=None)
def test_whatever_is_asked_the_reply_is_the_apps(pair, keyed, request):
    body, more = request
    fast, slow = (said(asked(pair[keyed], body, fast=fast, **more)) for fast in (True, False))
    assert fast == slow


@pytest.mark.parametrize("body", ["plain", "text chunk"])
def test_the_replies_that_are_compared_are_made_in_two_ways(pair, body):
    fast, slow = (asked(pair[0], BODIES[body], fast=fast) for fast in (True, False))
    assert is_fast(fast)
    assert not is_fast(slow)
    assert said(fast) == said(slow)
    assert fast.replies[0][0] == 200


def test_a_model_that_fails_is_told_by_the_app_under_the_same_id_and_not_logged(served, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    identity = str(uuid4())
    with failing(served, monkeypatch, ModelInvalid("The model fails on /a/path.", fix="none.")):
        fast = asked(served, headers={"x-request-id": identity})
        slow = asked(served, headers={"x-request-id": identity}, fast=False)
    assert not is_fast(fast)
    assert said(fast) == said(slow)
    assert (fast.replies[0][0], dict(fast.replies[0][1])["X-Request-ID"]) == (500, identity)
    assert "/a/path" not in fast.replies[0][2].decode()
    assert served.log.predictions == []
    assert [line["status"] for line in lines(caplog)] == [500, 500]


def test_what_nobody_foresaw_is_a_failure_of_the_server(served, monkeypatch):
    with failing(served, monkeypatch, RuntimeError("a secret")):
        channel = asked(served)
    status, headers, body = channel.replies[0]
    assert (status, dict(headers)["Content-Type"]) == (500, "application/problem+json")
    assert b"secret" not in body


def test_what_goes_wrong_before_anything_was_done_is_found_by_the_app_too(served, monkeypatch):
    def fail(_):
        raise MemoryError("no room")

    monkeypatch.setattr("deploy.server.fast_path.plain_png", fail)
    channel = asked(served)
    assert channel.replies[0][0] == 200
    assert not is_fast(channel)


def test_an_answer_that_does_not_come_in_time_is_given_up_and_its_caller_told(served, monkeypatch):
    batcher = batcher_of(served)
    monkeypatch.setattr(batcher, "_deadline", 0.2)
    engine, held = served.follower.current().engine, threading.Event()
    predict = engine.predict
    monkeypatch.setattr(engine, "predict", lambda *given, **more: (held.wait(10), predict(*given, **more))[1])
    threading.Timer(1, held.set).start()
    began = time.monotonic()
    channels = asked_all(served, [(scope(PNG), PNG)] * 2)
    assert time.monotonic() - began < 5
    for channel in channels:
        status, headers, body = channel.replies[0]
        assert (status, dict(headers)["Retry-After"]) == (503, "1")
        assert b"no answer came within 0.2 s" in body
    time.sleep(1)
    assert served.log.predictions == [], "nobody was answered"
    assert batcher.state().refused["late"] == 2


def test_a_caller_who_may_have_no_more_is_told_so_and_pays_once(make, settings):
    served = make(settings, prediction_rate_limit=0.001)
    most = 128
    statuses = [channel.replies[0][0] for channel in asked_all(served, [(scope(PNG), PNG)] * (most + 5))]
    assert (statuses.count(200), statuses.count(429)) == (most, 5)


def test_too_many_in_line_are_refused_with_a_time_to_come_again(served, monkeypatch):
    monkeypatch.setattr(batcher_of(served), "_capacity", 0)
    fast = asked(served)
    status, headers, body = fast.replies[0]
    assert (status, dict(headers)["Retry-After"]) == (503, "1")
    assert b"images wait already" in body


def test_while_a_challenger_has_a_part_the_app_answers(served, monkeypatch):
    state = served.follower.state()
    challenger = SimpleNamespace(
        model=None, traffic=Traffic(version=2, mode="mirror", share=0.5, since=datetime.now(UTC)), failure=None
    )
    monkeypatch.setattr(served.follower, "state", lambda: SimpleNamespace(**{**vars(state), "challenger": challenger}))
    channel = asked(served)
    assert channel.replies[0][0] == 200
    assert not is_fast(channel)


def test_without_a_model_the_app_says_so(tmp_path, settings):
    served = Served(tmp_path, settings)
    assert said(asked(served))[0] == 503


def test_a_client_that_went_away_fails_nobody_elses_answer(served):
    class Gone(Channel):
        def response_bytes(self, status, headers, body):
            super().response_bytes(status, headers, body)
            raise RuntimeError("gone")

    bridge = Bridge(served.app, longest_body=MAX_BODY_BYTES, fast_path=served.app.extensions[FAST_PATH])
    channels = [Gone(PNG), Channel(PNG), Gone(PNG), Channel(PNG)]

    async def run():
        bridge.__rsgi_init__(asyncio.get_running_loop())
        await asyncio.wait_for(asyncio.gather(*(bridge.__rsgi__(scope(PNG), c) for c in channels)), 20)
        bridge.__rsgi_del__(asyncio.get_running_loop())

    asyncio.run(run())
    assert [len(channel.replies) for channel in channels] == [1] * 4


def test_every_body_of_the_comparison_is_what_it_is_called(served):
    kinds = {name: is_fast(asked(served, body)) for name, body in BODIES.items()}
    assert {name for name, fast in kinds.items() if fast} == {"plain", "text chunk"}
