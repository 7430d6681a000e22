"""A client that never stops asking, and remembers what became of every request."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from uuid import uuid4

import httpx

PAUSE_S = 0.05


@dataclass(frozen=True)
class Asked:
    """One request: its id, what went on meanwhile, and why it failed (None: it was answered)."""

    request_id: str
    during: str
    failure: str | None
    seconds: float


class Traffic:
    """Sends PNGs one after the other, without trying again, until the block ends.

    `during` says what goes on, and is noted with each request.
    """

    def __init__(self, base_url: str, api_key: str, pngs: Sequence[bytes]) -> None:
        self._http = httpx.Client(base_url=base_url, headers={"X-API-Key": api_key}, timeout=10, trust_env=False)
        self._pngs = pngs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self.during = "nothing"
        self.asked: list[Asked] = []

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._http.close()

    @property
    def answered(self) -> set[str]:
        return {one.request_id for one in self.asked if one.failure is None}

    def failures(self, during: str) -> Counter[str]:
        return Counter(one.failure for one in self.asked if one.during == during and one.failure)

    def _send_all(self) -> None:
        while not self._stop.wait(PAUSE_S):
            self.asked.append(self._send(self._pngs[len(self.asked) % len(self._pngs)]))

    def _send(self, png: bytes) -> Asked:
        request_id, during, began = str(uuid4()), self.during, time.monotonic()
        headers = {"Content-Type": "image/png", "X-Request-ID": request_id}
        try:
            answer = self._http.post("/v1/predict", content=png, headers=headers)
        except httpx.TransportError as error:
            failure: str | None = type(error).__name__
        else:
            failure = None if answer.is_success else str(answer.status_code)
        return Asked(request_id, during, failure, time.monotonic() - began)
