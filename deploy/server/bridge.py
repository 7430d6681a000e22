"""Between the connections and the Flask app: a request reaches a thread of the app only when all of it has come.

Connections, TLS and HTTP are granian's (Rust), whose event loop waits for clients; they reach this module by RSGI,
granian's own interface. Bodies are read here, on the loop, with a deadline: a client that sends a byte a second costs
a few kilobytes of memory and no thread, takes nobody's turn, and is sent away. So is one that sends more than may be
sent, or asks for more at once than can be worked on or kept in memory.
"""

import asyncio
import io
import json
import logging
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol
from uuid import uuid4

from deploy.server.problems import CONTENT_TYPE, document
from deploy.server.request_context import HEADERS

logger = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
Reply = tuple[int, Headers, bytes]
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]

BODY_SECONDS = 10.0
"""From a request's headers to the last byte of its body, where a bridge is told no other time."""
_SWEEP_EVERY = 0.5
_SMALL_BODY = 64 << 10
"""Bytes; such bodies are not counted, since there are no more of them than connections."""


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


class FastPath(Protocol):
    """As `deploy.server.fast_path.FastPath`."""

    deadline: float

    def begin(self, environ: dict[str, Any], end: Callable[[Reply | None], object]) -> Callable[[], None] | None:
        """Begins to answer, or leaves it to the app."""


class _Refused(Exception):
    """A request that does not reach the app; holds the reply."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.reply = _problem(status, title, detail)


class _Room:
    """So much of something, of which one address gets half of what is free at most (as in `ml.serving.batcher`).

    Not safe to use from several threads at once.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._taken: Counter[str] = Counter()

    def take(self, host: str, amount: int = 1) -> None:
        """Takes some of it; 503 where there is too little."""
        if self._taken[host] + amount > self._free:
            raise _Refused(503, "Not available at the moment", "The server is busy: too many requests are under way.")
        self._taken[host] += amount
        self._free -= amount

    def give(self, host: str, amount: int = 1) -> None:
        """Gives it back."""
        self._free += amount
        self._taken[host] -= amount
        if not self._taken[host]:
            del self._taken[host]


class Bridge:
    """Serves a WSGI app over RSGI.

    Args:
        app: the WSGI app; called on up to `threads` threads at once. It gets a body that is in memory as a whole, cut
            off at one byte more than `longest_body`, so that it can tell.
        longest_body: bytes.
        body_seconds: from a request's headers to the last byte of its body, at most.
        threads: requests that the app works on at once; threads are started as they are needed.
        capacity: requests at most that have come as a whole and are not answered. One address may have half of what is
            free, so that there is room for others.
        fast_path: is asked first, and answers requests without a thread that waits for them, where it can.
        body_bytes: memory for bodies over 64 KiB, from their first byte to the reply; shared in the same way.
        on_refusal: told the status of each request that is refused before it reaches the app.
        on_end: called once when the server ends in order, after the last reply.
    """

    def __init__(
        self,
        app: Wsgi,
        *,
        longest_body: int,
        fast_path: FastPath | None = None,
        body_seconds: float = BODY_SECONDS,
        threads: int = 256,
        capacity: int = 512,
        body_bytes: int = 128 << 20,
        on_refusal: Callable[[int], object] = lambda _: None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._app = app
        self._longest_body = longest_body
        self._fast_path = fast_path
        self._body_seconds = body_seconds
        self._most_threads = threads
        self._on_refusal = on_refusal
        self._on_end = on_end
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Requests that ended on the fast path, on any thread: many that end together cost the loop one wake.
        self._ended: deque[tuple[asyncio.Future[bool], bool]] = deque()
        self._told = False
        # All of the following is touched on the event loop only.
        self._threads: list[threading.Thread] = []
        self._turns = _Room(capacity)
        self._memory = _Room(body_bytes)
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
        environ = self._environ(scope, host)
        counted = 0
        try:
            if "CONTENT_LENGTH" in environ or "HTTP_TRANSFER_ENCODING" in environ:
                counted = await self._read(channel, environ, host)
            else:
                environ["wsgi.input"] = io.BytesIO()
            reply = await self._work_on(environ, host, channel)
        except _Refused as refused:
            reply = refused.reply
            self._on_refusal(reply[0])
        finally:
            if counted:
                self._memory.give(host, counted)
        if reply is not None:
            channel.response_bytes(*reply)

    async def _read(self, channel: _Channel, environ: dict[str, Any], host: str) -> int:
        """Puts the body into `environ`; says how many bytes of it count in `_memory`."""
        declared = environ.get("CONTENT_LENGTH", "")
        length = int(declared) if declared.isdecimal() else None
        if length is not None and length > self._longest_body:
            # The app sees the length that was declared, and needs no more to refuse it.
            environ["wsgi.input"] = io.BytesIO()
            return 0
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._reading[task] = time.monotonic() + self._body_seconds
        counted = 0
        try:
            if length is not None and length <= _SMALL_BODY:
                body = await channel()
            else:
                parts = []
                async for part in channel:
                    self._memory.take(host, len(part))
                    counted += len(part)
                    parts.append(part)
                    if counted > self._longest_body:
                        break
                body = b"".join(parts)[: self._longest_body + 1]
        except BaseException as error:
            self._memory.give(host, counted)
            if isinstance(error, asyncio.CancelledError) and time.monotonic() > self._reading[task]:
                task.uncancel()
                said = f"The body did not come within {self._body_seconds:g} seconds."
                raise _Refused(408, "Request Timeout", said) from None
            raise
        finally:
            del self._reading[task]
        environ["CONTENT_LENGTH"] = str(len(body))
        environ["wsgi.input"] = io.BytesIO(body)
        return counted

    async def _work_on(self, environ: dict[str, Any], host: str, channel: _Channel) -> Reply | None:
        """The reply; None where it was given already."""
        self._turns.take(host)
        try:
            if self._fast_path is not None and await self._answer_fast(self._fast_path, environ, channel):
                return None
            done: asyncio.Future[Reply] = self._loop.create_future()
            self._hand_on(environ, done)
            return await done
        finally:
            self._turns.give(host)

    async def _answer_fast(self, fast_path: FastPath, environ: dict[str, Any], channel: _Channel) -> bool:
        """Whether it was answered; else the app is to."""
        done: asyncio.Future[bool] = self._loop.create_future()

        def end(reply: Reply | None) -> None:
            try:
                if reply is not None:
                    # From whichever thread this is: the way over the loop would take another tenth of a millisecond.
                    channel.response_bytes(*reply)
            except Exception:
                logger.exception("A reply could not be given")
            finally:
                self._ended.append((done, reply is not None))
                if not self._told:
                    self._told = True
                    self._loop.call_soon_threadsafe(self._end)

        give_up = fast_path.begin(environ, end)
        if give_up is None:
            return False
        timer = self._loop.call_later(fast_path.deadline, give_up)
        try:
            return await done
        finally:
            timer.cancel()

    def _end(self) -> None:
        self._told = False  # first: whoever ends from here on tells again
        while self._ended:
            done, answered = self._ended.popleft()
            if not done.done():  # the client may have gone
                done.set_result(answered)

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

    def _hand_on(self, environ: dict[str, Any], done: "asyncio.Future[Reply]") -> None:
        self._at_work += 1
        if self._at_work > len(self._threads) < self._most_threads:
            thread = threading.Thread(target=self._run, name=f"request-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put(lambda: self._call(environ, done))

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            task()

    def _call(self, environ: dict[str, Any], done: "asyncio.Future[Reply]") -> None:
        try:
            reply = _called(self._app, environ)
        except Exception:
            logger.exception("The app failed")
            reply = _problem(500, "The server failed", "The server failed on this request. Send it again.")
        self._loop.call_soon_threadsafe(self._finish, done, reply)

    def _finish(self, done: "asyncio.Future[Reply]", reply: Reply) -> None:
        self._at_work -= 1
        if not done.done():  # the client may have gone
            done.set_result(reply)


def _called(app: Wsgi, environ: dict[str, Any]) -> Reply:
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


def _problem(status: int, title: str, detail: str) -> Reply:
    """Of what never reached the app."""
    request_id, kind = str(uuid4()), title.lower().replace(" ", "-")
    body = document(status, title, f"{detail} Fix: send it again.", kind=kind, request_id=request_id)
    headers = [("content-type", CONTENT_TYPE), ("x-request-id", request_id), *HEADERS]
    if status == 503:
        headers.append(("retry-after", "1"))
    return status, headers, json.dumps(body).encode()
