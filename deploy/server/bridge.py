"""Between the connections and the Flask app: a request reaches a thread of the app only when all of it has come.

Connections, TLS and HTTP are granian's (Rust), whose event loop waits for clients; they reach this module by RSGI,
granian's own interface. Bodies are read here, on the loop, with a deadline: a client that sends a byte a second costs
a few kilobytes of memory and no thread, and is sent away. So is one that sends more than may be sent, or asks for more
at once than can be worked on.
"""

import asyncio
import io
import json
import logging
import math
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol
from uuid import uuid4

logger = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]

_SWEEP_EVERY = 0.5


class _Scope(Protocol):
    """As `granian.rsgi.Scope`."""

    method: str
    path: str
    query_string: str
    client: str
    scheme: str
    server: str
    http_version: str
    headers: Any


class _Channel(Protocol):
    """As `granian.rsgi.HTTPProtocol`."""

    def __call__(self) -> Awaitable[bytes]:
        """The whole body."""

    def __aiter__(self) -> Any:
        """The body as it comes."""

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        """Answers."""


class Bridge:
    """Serves a WSGI app over RSGI.

    Args:
        app: the WSGI app; called on up to `threads` threads at once. It gets a body that is in memory as a whole, cut
            off at one byte more than `longest_body`, so that it can tell.
        longest_body: bytes.
        body_seconds: from a request's headers to the last byte of its body, at most.
        threads: requests that the app works on at once; threads are started as they are needed.
        capacity: requests in the house at most. One address may have half of what is free (as in
            `ml.serving.batcher`), so that there is room for others.
        on_end: called once when the server ends in order, after the last reply.
    """

    def __init__(
        self,
        app: Wsgi,
        *,
        longest_body: int,
        body_seconds: float = 10.0,
        threads: int = 256,
        capacity: int = 512,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._app = app
        self._longest_body = longest_body
        self._body_seconds = body_seconds
        self._most_threads = threads
        self._capacity = capacity
        self._on_end = on_end
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # All of the following is touched on the event loop only.
        self._threads: list[threading.Thread] = []
        self._here: Counter[str] = Counter()
        self._in_all = 0
        self._at_work = 0
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._base: dict[str, Any] = {
            "SCRIPT_NAME": "",
            "SERVER_SOFTWARE": "granian",
            "wsgi.version": (1, 0),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by granian in its worker, before the first request."""
        self._loop = loop
        loop.call_later(_SWEEP_EVERY, self._send_slow_clients_away)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by granian in its worker, after the last reply."""
        for _ in self._threads:
            self._work.put(None)
        self._on_end()

    async def __rsgi__(self, scope: _Scope, channel: _Channel) -> None:
        """Answers one request."""
        host, _, _ = scope.client.rpartition(":")
        if self._here[host] >= self._capacity - self._in_all:
            _refuse(channel, 503, "Not available at the moment", "The server is busy: too many requests are under way.")
            return
        self._here[host] += 1
        self._in_all += 1
        try:
            await self._answer(scope, channel, host)
        finally:
            self._in_all -= 1
            self._here[host] -= 1
            if not self._here[host]:
                del self._here[host]

    async def _answer(self, scope: _Scope, channel: _Channel, host: str) -> None:
        environ = self._environ(scope, host)
        has_body = "CONTENT_LENGTH" in environ or "HTTP_TRANSFER_ENCODING" in environ
        body = b""
        if has_body:
            length = environ.get("CONTENT_LENGTH", "")
            read = await self._body(channel, length)
            if read is None:
                said = f"The body did not come within {self._body_seconds:g} seconds."
                _refuse(channel, 408, "Request Timeout", said)
                return
            body = read
            # Of a body that is too long the app sees the length that was declared, and needs no more to refuse it.
            if not (length.isdecimal() and int(length) > self._longest_body):
                environ["CONTENT_LENGTH"] = str(len(body))
        environ["wsgi.input"] = io.BytesIO(body)
        done: asyncio.Future[tuple[int, Headers, bytes]] = self._loop.create_future()
        self._hand_on(environ, done)
        status, headers, data = await done
        channel.response_bytes(status, headers, data)

    async def _body(self, channel: _Channel, length: str) -> bytes | None:
        """All of it; None where it did not come in time. One that is too long is not read to its end."""
        if length.isdecimal() and int(length) > self._longest_body:
            return b""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._reading[task] = time.monotonic() + self._body_seconds
        try:
            if length.isdecimal():
                return await channel()
            parts, size = [], 0
            async for part in channel:
                parts.append(part)
                size += len(part)
                if size > self._longest_body:
                    break
            return b"".join(parts)[: self._longest_body + 1]
        except asyncio.CancelledError:
            task.uncancel()
            return None
        finally:
            del self._reading[task]

    def _send_slow_clients_away(self) -> None:
        now = time.monotonic()
        for task, ends in self._reading.items():
            if now > ends:
                task.cancel()
        self._loop.call_later(_SWEEP_EVERY, self._send_slow_clients_away)

    def _environ(self, scope: _Scope, host: str) -> dict[str, Any]:
        environ = self._base.copy()
        name, _, port = scope.server.rpartition(":")
        environ["REQUEST_METHOD"] = scope.method
        environ["PATH_INFO"] = scope.path
        environ["QUERY_STRING"] = scope.query_string
        environ["SERVER_PROTOCOL"] = f"HTTP/{scope.http_version}"
        environ["SERVER_NAME"] = name
        environ["SERVER_PORT"] = port
        environ["REMOTE_ADDR"] = host.strip("[]")
        environ["wsgi.url_scheme"] = scope.scheme
        for name, value in scope.headers.items():
            key = name.upper().replace("-", "_")
            if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                key = f"HTTP_{key}"
            environ[key] = f"{environ[key]},{value}" if key in environ else value
        return environ

    def _hand_on(self, environ: dict[str, Any], done: "asyncio.Future[tuple[int, Headers, bytes]]") -> None:
        self._at_work += 1
        if self._at_work > len(self._threads) < self._most_threads:
            thread = threading.Thread(target=self._run, name=f"request-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put(lambda: self._call(environ, done))

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            task()

    def _call(self, environ: dict[str, Any], done: "asyncio.Future[tuple[int, Headers, bytes]]") -> None:
        try:
            reply = _called(self._app, environ)
        except Exception:
            logger.exception("The app failed")
            reply = _problem(500, "The server failed", "The server failed on this request. Send it again.")
        self._loop.call_soon_threadsafe(self._finish, done, reply)

    def _finish(self, done: "asyncio.Future[tuple[int, Headers, bytes]]", reply: tuple[int, Headers, bytes]) -> None:
        self._at_work -= 1
        if not done.done():  # the client may have gone
            done.set_result(reply)


def _called(app: Wsgi, environ: dict[str, Any]) -> tuple[int, Headers, bytes]:
    status, headers = 500, []

    def start_response(line: str, given: Headers, exc_info: object = None) -> None:  # noqa: ARG001 - by PEP 3333
        nonlocal status, headers
        status, headers = int(line[:3]), given

    parts = app(environ, start_response)
    try:
        body = b"".join(parts)
    finally:
        close = getattr(parts, "close", None)
        if close is not None:
            close()
    return status, headers, body


def _problem(status: int, title: str, detail: str, retry_after: float = 1) -> tuple[int, Headers, bytes]:
    """As `deploy.server.problems` says it, of what never reached the app."""
    request_id = str(uuid4())
    body = {
        "type": f"urn:cifar10:problem:{title.lower().replace(' ', '-')}",
        "title": title,
        "status": status,
        "detail": f"{detail} Fix: send it again.",
        "instance": f"urn:uuid:{request_id}",
        "request_id": request_id,
    }
    headers = [("content-type", "application/problem+json"), ("x-request-id", request_id)]
    if status == 503:
        headers.append(("retry-after", str(math.ceil(retry_after))))
    return status, headers, json.dumps(body).encode()


def _refuse(channel: _Channel, status: int, title: str, detail: str) -> None:
    channel.response_bytes(*_problem(status, title, detail))
