"""The client that waits for each answer. What it says and how it reads is `exchange`'s."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import httpx
from tenacity import Retrying

from ml.client import exchange
from ml.client.exchange import Ask, Conversation, NotNow, Prediction
from ml.client.pictures import Images, pictures_of
from ml.errors import RequestError


class CifarClient:
    """Talks to one server; safe to share between threads; a context manager.

    Args:
        base_url: the server's address.
        api_key: one of its keys, where it asks for one.
        patience: seconds for which a request is repeated while the server is away or says that it cannot now.
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
        headers = exchange.authorization(api_key)
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=exchange.TIMEOUT, transport=transport)
        self._retrying = exchange.retrying(patience)

    def __enter__(self) -> "CifarClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def predict(self, images: Images) -> list[Prediction]:
        """One prediction for each image, in their order, whatever their number.

        Args:
            images: uint8 (n, height, width, 3) RGB in 0-255, or paths or bytes of PNG, JPEG or WebP files.

        Raises:
            RequestError: one of its classes, when the server refuses an image or a file cannot be read.
            ConfigurationError: when it asks for another key.
            ServiceUnavailable: when it does not answer, or has no model, for longer than `patience`;
                TooManyRequests when it went on saying that this key asks too often.
        """
        talks = map(exchange.all_or_error, exchange.batches(pictures_of(images)))
        return [outcome for talk in talks for outcome in self._hold(talk) if isinstance(outcome, Prediction)]

    def predict_each(self, images: Images) -> Iterator[Prediction | RequestError]:
        """As `predict`, but what cannot be read or is refused is its error, in its place, and stops no other image.

        Answers come while the rest is still to be asked, so that a caller can show how far it is.

        Raises:
            ConfigurationError, ServiceUnavailable: as `predict`.
        """
        for talk in map(exchange.each_for_itself, exchange.batches(pictures_of(images))):
            yield from self._hold(talk)

    def feedback(self, prediction: Prediction, label: str) -> None:
        """Says what an image really shows. Saying it again replaces what was said before.

        Raises:
            PredictionNotFound: when the server never logged it.
            InputInvalid: when `label` is none of the ten classes.
            ConfigurationError, ServiceUnavailable: as `predict`.
        """
        self._ask(exchange.feedback_request(prediction, label))

    def model(self) -> dict[str, Any]:
        """What the server says of the model it serves: name, version, alias, data and when it was loaded. Asks once.

        Raises:
            ServiceUnavailable: when it does not answer, or has no model.
            ConfigurationError: as `predict`.
        """
        outcome = self._once(self._http.build_request("GET", "/v1/model", timeout=exchange.QUICK))
        if isinstance(outcome, NotNow):
            raise outcome.error
        return outcome

    def ready(self) -> bool:
        """Whether a prediction would be answered now; False also where nobody listens."""
        try:
            return self._http.get("/readyz", timeout=exchange.QUICK).is_success
        except httpx.TransportError:
            return False

    def _hold(self, talk: Conversation) -> list[Prediction | RequestError]:
        reply: dict[str, Any] | RequestError
        try:
            ask = next(talk)
            while True:
                try:
                    reply = self._ask(ask)
                except RequestError as refusal:
                    reply = refusal
                ask = talk.send(reply)
        except StopIteration as end:
            return list(end.value)

    def _ask(self, ask: Ask) -> dict[str, Any]:
        def once() -> Any:
            return self._once(self._http.build_request("POST", ask.path, content=ask.content, headers=ask.headers))

        return dict(Retrying(**self._retrying)(once))

    def _once(self, request: httpx.Request) -> dict[str, Any] | NotNow:
        try:
            return exchange.read(self._http.send(request))
        except httpx.TransportError as error:
            return exchange.no_answer(error, self._http.base_url)
