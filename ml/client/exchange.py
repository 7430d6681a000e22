"""The conversation with the server, without I/O: how requests are formed, replies read, and when one is asked again.

A repeated request carries the same id, so that the server logs it once. The interface itself is the server's
(`/openapi.json`). Several images go as base64 in JSON: over multipart/form-data they are a fifth smaller and take the
server half as long again to read (64 small PNGs: 6.9 ms against 9.6 ms).
"""

import base64
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import httpx
from tenacity import RetryCallState, retry_if_result, stop_before_delay, wait_random_exponential

from ml.client.pictures import Picture
from ml.errors import (
    CifarError,
    ConfigurationError,
    ImageTooLarge,
    ImageTypeUnsupported,
    ImageUndecodable,
    InputInvalid,
    PredictionNotFound,
    RequestError,
    ServiceUnavailable,
    TooManyRequests,
)

logger = logging.getLogger(__name__)

BATCH = 64
"""Images in one request."""
BATCH_BYTES = 6_000_000
"""Of the image files in one request; base64 makes eight megabytes of them, and the server takes ten."""

TIMEOUT = httpx.Timeout(30, connect=5)
QUICK = 5.0
"""Seconds for a question that takes the server no work."""

_REFUSALS: dict[int, type[CifarError]] = {
    400: ImageUndecodable,
    401: ConfigurationError,
    403: ConfigurationError,
    404: PredictionNotFound,
    413: ImageTooLarge,
    415: ImageTypeUnsupported,
    422: InputInvalid,
}
_ASK_AGAIN: dict[int, type[ServiceUnavailable]] = {
    408: ServiceUnavailable,
    429: TooManyRequests,
    **dict.fromkeys((500, 502, 503, 504), ServiceUnavailable),
}
_backoff = wait_random_exponential(multiplier=0.2, max=3)


@dataclass(frozen=True)
class Prediction:
    """What the server said of one image. `request_id` and `index` name it for feedback.

    `data` is SYNTHETIC, and `weights` RANDOM WEIGHTS, where the model was made of such; else `weights` is None.
    """

    request_id: str
    index: int
    label: str
    class_id: int
    probability: float
    probabilities: dict[str, float]
    model_name: str
    model_version: int
    data: str
    alias: str
    weights: str | None = None


@dataclass(frozen=True)
class Ask:
    """One request, as often as it is sent."""

    path: str
    content: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class NotNow:
    """The server could not answer and may later. `retry_after`: the seconds that it asked for, if it did."""

    error: ServiceUnavailable
    retry_after: float | None = None


Conversation = Generator[Ask, dict[str, Any] | RequestError, list[Prediction | RequestError]]
"""Yields what to ask, is sent the reply's object or the refusal, and returns an outcome for each image."""


def authorization(api_key: str | None) -> dict[str, str]:
    """The headers of every request."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def predict_request(pictures: Sequence[Picture]) -> Ask:
    """Asks for one or more predictions: one image as it is, several in JSON."""
    if len(pictures) == 1 and (kind := pictures[0].content_type):
        return _ask("/v1/predict", pictures[0].data, kind)
    return _ask_json("/v1/predict", {"images": [base64.b64encode(picture.data).decode() for picture in pictures]})


def feedback_request(prediction: Prediction, label: str) -> Ask:
    """Says what an image really shows."""
    body = {"request_id": prediction.request_id, "index": prediction.index, "label": label}
    return _ask_json("/v1/feedback", body)


def batches(pictures: Iterable[Picture | RequestError]) -> Iterator[list[Picture | RequestError]]:
    """In their order, as many together as fit in one request; what could not be read travels in its place."""
    batch: list[Picture | RequestError] = []
    size = 0
    for picture in pictures:
        more = len(picture.data) if isinstance(picture, Picture) else 0
        if batch and (len(batch) == BATCH or size + more > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(picture)
        size += more
    if batch:
        yield batch


def all_or_error(batch: list[Picture | RequestError]) -> Conversation:
    """The conversation about a batch of which every image is wanted; raises the first error."""
    pictures = []
    for picture in batch:
        if isinstance(picture, RequestError):
            raise picture
        pictures.append(picture)
    reply = yield predict_request(pictures)
    if isinstance(reply, RequestError):
        raise _naming(reply, pictures)
    return [*answers(reply)]


def each_for_itself(batch: list[Picture | RequestError]) -> Conversation:
    """The conversation about a batch in which an image that is refused costs no other its answer.

    The server refuses a batch as a whole; each of its images is then asked for alone.
    """
    pictures = [picture for picture in batch if isinstance(picture, Picture)]
    found = iter((yield from _one_or_all(pictures)) if pictures else [])
    return [picture if isinstance(picture, RequestError) else next(found) for picture in batch]


def _one_or_all(pictures: list[Picture]) -> Conversation:
    reply = yield predict_request(pictures)
    if not isinstance(reply, RequestError):
        return [*answers(reply)]
    if len(pictures) == 1:
        return [_naming(reply, pictures)]
    found: list[Prediction | RequestError] = []
    for picture in pictures:
        found += yield from _one_or_all([picture])
    return found


def answers(body: dict[str, Any]) -> list[Prediction]:
    """The predictions of a reply, in the order of the request's images."""
    model = body["model"]
    return [
        Prediction(
            request_id=body["request_id"],
            index=index,
            label=said["label"],
            class_id=said["class_id"],
            probability=said["probability"],
            probabilities=said["probabilities"],
            model_name=model["name"],
            model_version=model["version"],
            data=model["data"],
            alias=model["alias"],
            weights=model.get("weights"),
        )
        for index, said in enumerate(body["predictions"])
    ]


def read(reply: httpx.Response) -> dict[str, Any] | NotNow:
    """The reply's JSON object, or that the server may answer later.

    Raises:
        RequestError: one of its classes, when the server refuses what was sent.
        ConfigurationError: when it asks for another key, or what answers there is no prediction server.
    """
    body = _json_object(reply)
    if reply.is_success and body is not None:
        return body
    said = body if body and reply.headers.get("Content-Type", "").startswith("application/problem+json") else {}
    detail = said.get("detail", f"What answers at {reply.url} said {reply.status_code}.")
    what, _, fix = detail.partition(" Fix: ")
    fix = fix or f"see the server's log for request {reply.headers.get('X-Request-ID', '')}.".replace(" .", ".")
    if later := _ASK_AGAIN.get(reply.status_code):
        if later is TooManyRequests:
            fix = "ask less often, or with another key." if not said else fix
        return NotNow(later(what, fix=fix), retry_after_seconds(reply.headers.get("Retry-After")))
    if not said:
        raise ConfigurationError(
            f"What answers at {reply.url} said {reply.status_code}, and not as the prediction server does.",
            fix="see that the address is the prediction server's.",
        )
    raise _REFUSALS.get(reply.status_code, InputInvalid)(what, fix=fix)


def no_answer(error: httpx.TransportError, base_url: httpx.URL) -> NotNow:
    """Nobody was there, or the connection broke."""
    return NotNow(
        ServiceUnavailable(
            f"The prediction server at {base_url} does not answer: {error or type(error).__name__}.",
            fix="start it (`make up`), or see that the address is right.",
        )
    )


def retry_after_seconds(header: str | None) -> float | None:
    """What `Retry-After` asks for, as seconds from now: it is a number of them or a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def wait_seconds(state: RetryCallState) -> float:
    """How long to wait before it is asked again: never less than the server said, and never all callers at once."""
    asked: NotNow = state.outcome.result()  # type: ignore[union-attr]
    return (asked.retry_after or 0.0) + _backoff(state)


def retrying(patience: float) -> dict[str, Any]:
    """How a question is repeated, as arguments of tenacity's `Retrying` and `AsyncRetrying`.

    It is given up where the next attempt would come later than `patience` seconds after the first.
    """
    return {
        "retry": retry_if_result(lambda outcome: isinstance(outcome, NotNow)),
        "wait": wait_seconds,
        "stop": stop_before_delay(patience),
        "before_sleep": _say,
        "retry_error_callback": _give_up,
    }


def _say(state: RetryCallState) -> None:
    outcome: NotNow = state.outcome.result()  # type: ignore[union-attr]
    logger.info("%s Asking again in %.1f s", outcome.error.message, state.upcoming_sleep)


def _give_up(state: RetryCallState) -> None:
    raise state.outcome.result().error  # type: ignore[union-attr]


def _naming(error: RequestError, pictures: list[Picture]) -> RequestError:
    path = pictures[0].path if len(pictures) == 1 else None
    return type(error)(f"{path}: {error.message}", fix=error.fix) if path else error


def _ask_json(path: str, payload: dict[str, Any]) -> Ask:
    return _ask(path, json.dumps(payload).encode(), "application/json")


def _ask(path: str, content: bytes, kind: str) -> Ask:
    return Ask(path, content, {"Content-Type": kind, "X-Request-ID": str(uuid4())})


def _json_object(reply: httpx.Response) -> dict[str, Any] | None:
    try:
        body = reply.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None
