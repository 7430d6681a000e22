"""The client for programs that run on asyncio. What it says and how it reads is `exchange`'s."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import httpx
from tenacity import AsyncRetrying

from ml.client import exchange
from ml.client.exchange import Ask, Conversation, NotNow, Prediction
from ml.client.pictures import Images, Picture, pictures_of
from ml.errors import RequestError


class AsyncCifarClient:
    """As `CifarClient`, method by method; asks for several batches at once. An asynchronous context manager.

    Args:
        base_url, api_key, patience: as `CifarClient`.
        concurrency: requests under way at once, for one call.
        transport: for tests.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        patience: float = 30.0,
        concurrency: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = exchange.authorization(api_key)
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=headers, timeout=exchange.TIMEOUT, transport=transport
        )
        self._retrying = exchange.retrying(patience)
        self._concurrency = concurrency

    async def __aenter__(self) -> "AsyncCifarClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def predict(self, images: Images) -> list[Prediction]:
        """As `CifarClient.predict`."""
        outcomes = self._outcomes(images, exchange.all_or_error)
        return [outcome async for outcome in outcomes if isinstance(outcome, Prediction)]

    def predict_each(self, images: Images) -> AsyncIterator[Prediction | RequestError]:
        """As `CifarClient.predict_each`, to be iterated with `async for`."""
        return self._outcomes(images, exchange.each_for_itself)

    async def feedback(self, prediction: Prediction, label: str) -> None:
        """As `CifarClient.feedback`."""
        await self._ask(exchange.feedback_request(prediction, label))

    async def model(self) -> dict[str, Any]:
        """As `CifarClient.model`."""
        outcome = await self._once(self._http.build_request("GET", "/v1/model", timeout=exchange.QUICK))
        if isinstance(outcome, NotNow):
            raise outcome.error
        return outcome

    async def ready(self) -> bool:
        """As `CifarClient.ready`."""
        try:
            return (await self._http.get("/readyz", timeout=exchange.QUICK)).is_success
        except httpx.TransportError:
            return False

    async def _outcomes(
        self, images: Images, talk_about: Callable[[list[Picture | RequestError]], Conversation]
    ) -> AsyncIterator[Prediction | RequestError]:
        """In the images' order. No more is read ahead than is being asked for."""
        batches = exchange.batches(pictures_of(images))
        under_way: deque[asyncio.Task[list[Prediction | RequestError]]] = deque()
        try:
            while True:
                while len(under_way) < self._concurrency:
                    batch = await asyncio.to_thread(next, batches, None)  # reads files
                    if batch is None:
                        break
                    under_way.append(asyncio.create_task(self._hold(talk_about(batch))))
                if not under_way:
                    return
                for outcome in await under_way.popleft():
                    yield outcome
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _hold(self, talk: Conversation) -> list[Prediction | RequestError]:
        reply: dict[str, Any] | RequestError
        try:
            ask = next(talk)
            while True:
                try:
                    reply = await self._ask(ask)
                except RequestError as refusal:
                    reply = refusal
                ask = talk.send(reply)
        except StopIteration as end:
            return list(end.value)

    async def _ask(self, ask: Ask) -> dict[str, Any]:
        async def once() -> Any:
            request = self._http.build_request("POST", ask.path, content=ask.content, headers=ask.headers)
            return await self._once(request)

        return dict(await AsyncRetrying(**self._retrying)(once))

    async def _once(self, request: httpx.Request) -> dict[str, Any] | NotNow:
        try:
            return exchange.read(await self._http.send(request))
        except httpx.TransportError as error:
            return exchange.no_answer(error, self._http.base_url)
