"""A small client of the prediction server, for programs: `CifarClient("http://127.0.0.1:8000").predict(images)`.

Owns how requests are formed and repeated. A repeated prediction carries the same request id, so that the server logs it
once. The interface itself is the server's (`/openapi.json`).
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from ml.errors import (
    CifarError,
    ConfigurationError,
    ImageTooLarge,
    ImageTypeUnsupported,
    ImageUndecodable,
    InputInvalid,
    PredictionNotFound,
    ServiceUnavailable,
)

BATCH = 64
"""Images in one request."""

_REFUSALS: dict[int, type[CifarError]] = {
    400: ImageUndecodable,
    401: ConfigurationError,
    404: PredictionNotFound,
    413: ImageTooLarge,
    415: ImageTypeUnsupported,
    422: InputInvalid,
}


@dataclass(frozen=True)
class Prediction:
    """What the server said of one image. `request_id` and `index` name it for feedback."""

    request_id: str
    index: int
    label: str
    class_id: int
    probability: float
    probabilities: dict[str, float]
    model_name: str
    model_version: int
    data: str


class CifarClient:
    """Talks to one server; safe to share between threads; a context manager.

    Args:
        base_url: the server's address.
        api_key: one of its keys, where it asks for one.
        patience: seconds for which a request is repeated while the server is away or says 503.
        transport: for tests.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        patience: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=30, transport=transport)
        self._patience = patience

    def __enter__(self) -> "CifarClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def predict(self, images: np.ndarray | Sequence[Path | str]) -> list[Prediction]:
        """One prediction for each image, in their order, whatever their number.

        Args:
            images: uint8 (n, height, width, 3) RGB in 0-255, or paths of PNG, JPEG or WebP files.

        Raises:
            RequestError: one of its classes, when the server refuses an image.
            ConfigurationError: when it asks for another key.
            ServiceUnavailable: when it does not answer, or has no model, for longer than `patience`.
        """
        encoded = [_png(image) for image in images] if isinstance(images, np.ndarray) else _files(images)
        found: list[Prediction] = []
        for start in range(0, len(encoded), BATCH):
            payload = {"images": encoded[start : start + BATCH]}
            found += _predictions(self._ask("/v1/predict", payload, {"X-Request-ID": str(uuid4())}))
        return found

    def feedback(self, prediction: Prediction, label: str) -> None:
        """Says what an image really shows. Saying it again replaces what was said before.

        Raises:
            PredictionNotFound: when the server never logged it.
            InputInvalid: when `label` is none of the ten classes.
            ConfigurationError, ServiceUnavailable: as `predict`.
        """
        self._ask("/v1/feedback", {"request_id": prediction.request_id, "index": prediction.index, "label": label}, {})

    def model(self) -> dict[str, Any]:
        """What the server says of the model it serves: name, version, alias, data and when it was loaded.

        Raises:
            ServiceUnavailable: when it does not answer, or has no model.
        """
        try:
            reply = self._http.get("/v1/model", timeout=5)
        except httpx.TransportError as error:
            raise ServiceUnavailable(
                f"The prediction server does not answer: {error}.", fix="start it (`make up`) and try again."
            ) from error
        if reply.is_error:
            raise _refusal(reply)
        return dict(reply.json())

    def ready(self) -> bool:
        """Whether a prediction would be answered now; False also where nobody listens."""
        try:
            return self._http.get("/readyz", timeout=5).is_success
        except httpx.TransportError:
            return False

    def _ask(self, path: str, payload: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        attempts = Retrying(
            retry=retry_if_exception_type(ServiceUnavailable),
            stop=stop_after_delay(self._patience),
            wait=wait_random_exponential(multiplier=0.2, max=3),
            reraise=True,
        )
        return attempts(self._ask_once, path, payload, headers)

    def _ask_once(self, path: str, payload: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        try:
            reply = self._http.post(path, json=payload, headers=headers)
        except httpx.TransportError as error:
            raise ServiceUnavailable(
                f"The prediction server at {self._http.base_url} does not answer: {error}.",
                fix="start it (`make up`), or see that the address is right.",
            ) from error
        if reply.is_success:
            return dict(reply.json())
        raise _refusal(reply)


def _refusal(reply: httpx.Response) -> CifarError:
    is_problem = reply.headers.get("Content-Type", "").startswith("application/problem+json")
    detail = reply.json()["detail"] if is_problem else f"The server answered {reply.status_code}."
    what, _, fix = detail.partition(" Fix: ")
    kind = _REFUSALS.get(reply.status_code, ServiceUnavailable)
    return kind(what, fix=fix or "see the server's log for this request.")


def _predictions(body: dict[str, Any]) -> Iterable[Prediction]:
    model = body["model"]
    for index, said in enumerate(body["predictions"]):
        yield Prediction(
            request_id=body["request_id"],
            index=index,
            label=said["label"],
            class_id=said["class_id"],
            probability=said["probability"],
            probabilities=said["probabilities"],
            model_name=model["name"],
            model_version=model["version"],
            data=model["data"],
        )


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode()


def _files(paths: Sequence[Path | str]) -> list[str]:
    return [base64.b64encode(Path(path).read_bytes()).decode() for path in paths]
