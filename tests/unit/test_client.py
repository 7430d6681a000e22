"""What both clients say, how they read what comes back, and when they ask again: no network, no waiting."""

import asyncio
import base64
import inspect
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest

from ml.client import BATCH, AsyncCifarClient, CifarClient, exchange
from ml.client.pictures import Picture, pictures_of
from ml.errors import (
    CifarError,
    ConfigurationError,
    ImageNotFound,
    ImageTooLarge,
    ImageTypeUnsupported,
    ImageUndecodable,
    ImageUnreadable,
    InputInvalid,
    PredictionNotFound,
    ServiceUnavailable,
    TooManyRequests,
)

PNG, JPEG, WEBP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"
BROKEN = PNG + b"broken"


def reply_to(request, label="cat"):
    """As the server's: refuses a request that holds BROKEN, naming which image it is of several."""
    if request.url.path == "/v1/feedback":
        return httpx.Response(201, json={})
    if request.headers["Content-Type"] == "application/json":
        images = [base64.b64decode(image) for image in json.loads(request.content)["images"]]
    else:
        images = [request.content]
    if BROKEN in images:
        which = f"Image {images.index(BROKEN)}: " if len(images) > 1 else ""
        return problem(400, f"{which}It is no whole PNG. Fix: send one.")
    said = {"label": label, "class_id": 3, "probability": 0.9, "probabilities": {label: 0.9}}
    return httpx.Response(
        200,
        json={
            "request_id": request.headers["X-Request-ID"],
            "model": {"name": "m", "version": 2, "alias": "champion", "data": "cifar-10"},
            "predictions": [said] * len(images),
        },
    )


def problem(status, detail, **headers):
    content = json.dumps({"detail": detail})
    return httpx.Response(status, content=content, headers={"Content-Type": "application/problem+json", **headers})


class Server:
    """Answers in this order, an exception by raising it, and then as the real one; keeps what it was asked."""

    def __init__(self, *first):
        self.first, self.asked = list(first), []

    def __call__(self, request):
        self.asked.append(request)
        answer = self.first.pop(0) if self.first else reply_to(request)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)  # one is read once


class Twin:
    """Either client, called the same way."""

    def __init__(self, is_async, server, **options):
        self.is_async, self.options = is_async, {"transport": httpx.MockTransport(server), **options}

    def call(self, method, *arguments):
        if not self.is_async:
            with CifarClient("http://server", **self.options) as client:
                found = getattr(client, method)(*arguments)
                return list(found) if method == "predict_each" else found

        async def inside():
            async with AsyncCifarClient("http://server", **self.options) as client:
                found = getattr(client, method)(*arguments)
                return [one async for one in found] if method == "predict_each" else await found

        return asyncio.run(inside())


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def twin(request):
    return lambda server, **options: Twin(request.param, server, **options)


@pytest.fixture
def slept(monkeypatch):
    waits = []

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    monkeypatch.setattr("asyncio.sleep", note)
    monkeypatch.setattr(exchange, "_backoff", lambda state: 0.25)
    return waits


def test_the_twins_have_the_same_methods_with_the_same_arguments():
    def signatures(client):
        named = {name: getattr(client, name) for name in dir(client) if not name.startswith("_")}
        return {name: list(inspect.signature(method).parameters) for name, method in named.items()}

    assert signatures(CifarClient) == signatures(AsyncCifarClient)
    assert set(signatures(CifarClient)) == {"predict", "predict_each", "feedback", "model", "ready", "close"}


@pytest.mark.parametrize(
    ("data", "path", "kind"),
    [
        (PNG, None, "image/png"),
        (JPEG, "x.png", "image/jpeg"),
        (WEBP, None, "image/webp"),
        (b"x", "x.png", "image/png"),
        (b"x", "x.txt", None),
        (b"RIFF\0\0\0\0WAVE", None, None),
    ],
)
def test_an_image_is_what_its_bytes_say_and_else_what_its_name_says(data, path, kind):
    assert Picture(data, path).content_type == kind


def test_one_image_goes_as_it_is_and_several_in_json(twin):
    server = Server()
    one = twin(server).call("predict", [JPEG])
    assert (server.asked[0].headers["Content-Type"], server.asked[0].content) == ("image/jpeg", JPEG)
    assert one[0].request_id == server.asked[0].headers["X-Request-ID"]
    twin(server).call("predict", [PNG, WEBP])
    assert json.loads(server.asked[1].content) == {"images": [base64.b64encode(x).decode() for x in (PNG, WEBP)]}
    twin(server).call("predict", [b"what is this"])  # the server will see
    assert list(json.loads(server.asked[2].content)) == ["images"]
    twin(server, api_key="k").call("predict", PNG)
    assert server.asked[3].headers["Authorization"] == "Bearer k"


def test_batches_are_cut_by_number_and_by_bytes():
    few = [Picture(b"x")] * (BATCH + 1)
    assert [len(batch) for batch in exchange.batches(few)] == [BATCH, 1]
    large = [Picture(bytes(exchange.BATCH_BYTES // 2))] * 5
    assert [len(batch) for batch in exchange.batches(large)] == [2, 2, 1]
    assert [len(batch) for batch in exchange.batches([Picture(bytes(2 * exchange.BATCH_BYTES))] * 2)] == [1, 1]
    assert list(exchange.batches([])) == []


def test_no_images_ask_nothing(twin):
    server = Server()
    assert twin(server).call("predict", []) == []
    assert twin(server).call("predict_each", []) == []
    assert server.asked == []


def test_feedback_across_batches_names_each_images_own_request(twin):
    server = Server()
    found = twin(server).call("predict", [PNG] * (BATCH + 2))
    ids = [request.headers["X-Request-ID"] for request in server.asked]
    assert [(p.request_id, p.index) for p in found] == [(ids[0], i) for i in range(BATCH)] + [(ids[1], 0), (ids[1], 1)]
    twin(server).call("feedback", found[BATCH + 1], "ship")
    assert json.loads(server.asked[-1].content) == {"request_id": ids[1], "index": 1, "label": "ship"}


def test_an_image_that_is_refused_costs_no_other_its_answer(twin, tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "broken.png").write_bytes(BROKEN)
    paths = [tmp_path / name for name in ("good.png", "broken.png", "gone.png", "good.png")]
    server = Server()
    first, broken, gone, last = twin(server).call("predict_each", [*paths])
    assert (first.label, last.label) == ("cat", "cat")
    assert (type(broken), broken.message) == (ImageUndecodable, f"{paths[1]}: It is no whole PNG.")
    assert (type(gone), str(paths[2]) in gone.message) == (ImageNotFound, True)
    assert len(server.asked) == 1 + 3
    only = twin(Server()).call("predict_each", [tmp_path / "gone.png", BROKEN])
    assert [type(outcome) for outcome in only] == [ImageNotFound, ImageUndecodable]


def test_predict_raises_the_first_refusal(twin, tmp_path):
    with pytest.raises(ImageUndecodable, match="Image 1"):
        twin(Server()).call("predict", [PNG, BROKEN])
    (tmp_path / "broken.png").write_bytes(BROKEN)
    with pytest.raises(ImageUndecodable, match=r"broken\.png: It is no whole PNG"):
        twin(Server()).call("predict", str(tmp_path / "broken.png"))
    with pytest.raises(ImageNotFound, match=r"gone\.png.* Fix: see that the path"):
        twin(Server()).call("predict", [tmp_path / "gone.png"])
    with pytest.raises(ImageUnreadable, match="Is a directory"):
        twin(Server()).call("predict", [tmp_path])


@pytest.mark.parametrize(
    "array", [np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 4), np.uint8)]
)
def test_an_array_of_another_shape_is_refused_before_it_is_sent(array):
    with pytest.raises(InputInvalid, match=r"not uint8 of shape \(n, height, width, 3\)"):
        pictures_of(array)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, ImageUndecodable), (401, ConfigurationError), (404, PredictionNotFound), (413, ImageTooLarge)),
        *((415, ImageTypeUnsupported), (422, InputInvalid), (405, InputInvalid)),
    ],
)
def test_a_refusal_is_raised_with_its_fix_and_not_asked_again(twin, status, kind):
    server = Server(problem(status, "It is wrong. Fix: mend it."))
    with pytest.raises(kind) as raised:
        twin(server).call("predict", [PNG])
    assert (raised.value.message, raised.value.fix) == ("It is wrong.", "mend it.")
    assert len(server.asked) == 1


@pytest.mark.parametrize("answer", [httpx.Response(404, text="nginx"), httpx.Response(200, text="<html>")])
def test_what_is_no_prediction_server_is_a_wrong_address(twin, answer):
    with pytest.raises(ConfigurationError, match="http://server/v1/predict"):
        twin(Server(answer)).call("predict", [PNG])


@pytest.mark.parametrize(
    "failure",
    [
        *(httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut")),
        *(httpx.Response(status) for status in (408, 429, 500, 502, 503, 504)),
    ],
    ids=repr,
)
def test_what_passes_is_asked_again_with_the_same_id(twin, slept, failure):
    server = Server(failure, failure)
    assert twin(server).call("predict", [PNG])[0].label == "cat"
    assert len({request.headers["X-Request-ID"] for request in server.asked}) == 1
    assert {request.content for request in server.asked} == {PNG}
    assert slept == [0.25, 0.25]


def test_retry_after_is_honoured_and_jitter_comes_on_top(twin, slept):
    server = Server(problem(429, "Too often.", **{"Retry-After": "7"}), problem(503, "No.", **{"Retry-After": "2"}))
    twin(server).call("predict", [PNG])
    assert slept == [7.25, 2.25]


@pytest.mark.parametrize(("status", "kind"), [(429, TooManyRequests), (503, ServiceUnavailable)])
def test_a_wait_that_would_outlast_the_callers_patience_is_not_begun(twin, slept, status, kind):
    server = Server(problem(status, "Not now. Fix: come back tomorrow.", **{"Retry-After": "60"}))
    with pytest.raises(ServiceUnavailable, match="Fix: come back tomorrow") as raised:
        twin(server, patience=30).call("predict", [PNG])
    assert type(raised.value) is kind
    assert (len(server.asked), slept) == (1, [])


def test_patience_of_nothing_asks_once(twin):
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(ServiceUnavailable, match=r"http://server.*refused"):
        twin(server, patience=0).call("predict", [PNG])
    assert len(server.asked) == 1


def test_the_wait_grows_and_differs_between_callers():
    server = Server(*[httpx.ConnectError("refused")] * 8)
    waits = []
    policy = {**exchange.retrying(1000), "sleep": waits.append}
    client = CifarClient("http://server", transport=httpx.MockTransport(server))
    client._retrying = policy
    client.predict([PNG])
    bounds = [min(3, 0.2 * 2**attempt) for attempt in range(8)]
    assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == 8


def test_retry_after_is_seconds_or_a_date():
    assert exchange.retry_after_seconds("120") == 120
    assert exchange.retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=60))) == pytest.approx(
        60, abs=2
    )
    assert exchange.retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert exchange.retry_after_seconds("Wed, 21 Oct 2015 07:28:00") == 0
    assert exchange.retry_after_seconds("soon") is None
    assert exchange.retry_after_seconds("-5") is None
    assert exchange.retry_after_seconds(None) is None


def test_the_async_client_asks_for_so_many_batches_at_once_and_keeps_their_order():
    under_way, most, labels = 0, 0, iter(range(100))

    class Slow(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            nonlocal under_way, most
            label = str(next(labels))
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.02 if int(label) % 2 else 0.05)
            under_way -= 1
            return reply_to(request, label)

    async def inside():
        async with AsyncCifarClient("http://server", concurrency=3, transport=Slow()) as client:
            return [prediction.label async for prediction in client.predict_each([PNG] * (7 * BATCH))]

    assert asyncio.run(inside()) == [str(batch) for batch in range(7) for _ in range(BATCH)]
    assert most == 3


def test_who_stops_listening_leaves_no_request_behind():
    cancelled = []

    class Endless(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            if not request.headers["Content-Type"].startswith("image/"):
                return reply_to(request)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(request)
                raise

    async def inside():
        async with AsyncCifarClient("http://server", transport=Endless()) as client:
            outcomes = client.predict_each([PNG] * (BATCH + 1))
            assert (await anext(outcomes)).label == "cat"
            await outcomes.aclose()

    asyncio.run(inside())
    assert len(cancelled) == 1


def test_model_and_ready_ask_once(twin):
    server = Server(httpx.ConnectError("refused"), httpx.ConnectError("refused"))
    with pytest.raises(ServiceUnavailable):
        twin(server).call("model")
    assert twin(server).call("ready") is False
    server = Server(httpx.Response(200, json={"version": 2}), httpx.Response(200), httpx.Response(503))
    assert twin(server).call("model") == {"version": 2}
    assert [twin(server).call("ready") for _ in range(2)] == [True, False]


def test_every_error_of_the_client_says_a_fix(twin):
    for answer in (
        problem(400, "No."),
        httpx.Response(429),
        httpx.Response(503),
        httpx.Response(404),
        BrokenPipeError(),
    ):
        failure = httpx.ConnectError("x") if isinstance(answer, Exception) else answer
        with pytest.raises(CifarError) as raised:
            twin(Server(failure), patience=0).call("predict", [PNG])
        assert raised.value.fix.strip(" .")
