"""Sends HTTP requests over keep-alive connections and measures every answer; one thread, the standard library alone.

It shares the cores with the server that it loads, so it is made to need few of their cycles: requests are bytes made
beforehand, connections wait in epoll, and of an answer only its status and its Content-Length are read.

Closed loop: each client sends its next request when the last one was answered. Open loop: requests fall due at times
drawn beforehand, whatever the server does, and a latency counts from when the request was due, not from when a
connection was free for it; so a stall counts against every request that it delays (no coordinated omission).

Run as a program it reads one job as a line of JSON from stdin and writes one outcome as JSON to stdout; a job without
an end of its own goes on until stdin ends.
"""

import gc
import json
import math
import random
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DEADLINE = 60.0
"""Seconds after which a request without an answer is given up."""
PAUSE = 0.1
"""Seconds before a connection that failed is made again."""
MOST_CONNECTIONS = 64
"""Of an open loop; what is due while all are busy waits, and its wait counts."""

_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a load. `sent` is the sum of `answered` (by status) and `errors` (by kind).

    `seconds` go from the first request to the last answer, so that nothing is counted that was not waited for:
    `per_second` is the answers with status 200 in that time. Latencies are of those answers, in ms; NaN where there is
    none. `cpu_us` is this process' own CPU time per request. `due` says how many requests an open loop asked for.
    """

    sent: int
    answered: dict[str, int]
    errors: dict[str, int]
    seconds: float
    per_second: float
    latency_ms: dict[str, float]
    cpu_us: float
    due: int | None = None

    @property
    def ok(self) -> int:
        """Answers with status 200."""
        return self.answered.get("200", 0)

    @property
    def failed(self) -> int:
        """Requests without one."""
        return self.sent - self.ok


class _Connection:
    """A client's connection, and whether a request is out on it: `since` is when that was due."""

    __slots__ = ("buffer", "out", "since", "socket")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.buffer = b""
        self.out = False
        self.since = 0


class Load:
    """One load on one server.

    Args:
        address: host and port.
        requests: whole requests, as bytes; they are sent in turn, over and over.
        deadline: seconds after which a request is given up.
    """

    def __init__(self, address: tuple[str, int], requests: Sequence[bytes], *, deadline: float = DEADLINE) -> None:
        self._address, self._requests, self._deadline = address, requests, int(deadline * 1e9)
        self._epoll = select.epoll()
        self._connected: dict[int, _Connection] = {}
        self._out = 0  # requests that wait for their answer
        self._latencies: list[int] = []
        self._answered: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._sent = 0
        self._last = 0  # when the last answer came, or the last error

    def closed(self, clients: int, seconds: float, *, until: int | None = None) -> Outcome:
        """So many clients, each with one request at a time, for so long; then waits for what is still out.

        Args:
            clients: connections.
            seconds: how long new requests are sent, `math.inf` for no end.
            until: a file descriptor; new requests end when it can be read or is closed.
        """
        idle = deque(_Connection() for _ in range(clients))
        resting: deque[tuple[int, _Connection]] = deque()
        if until is not None:
            self._epoll.register(until, select.EPOLLIN)
        cpu, began = time.process_time_ns(), time.perf_counter_ns()
        end = math.inf if math.isinf(seconds) else began + int(seconds * 1e9)
        looked = began
        while True:
            now = time.perf_counter_ns()
            while resting and resting[0][0] <= now:
                idle.append(resting.popleft()[1])
            while idle and now < end:
                connection = idle.popleft()
                now = time.perf_counter_ns()
                if not self._send(connection, now):
                    resting.append((now + int(PAUSE * 1e9), connection))
            if not self._out and now >= end:
                break
            for descriptor, _ in self._epoll.poll(PAUSE if resting else 1):
                if descriptor == until:
                    self._epoll.unregister(descriptor)
                    end = now
                    continue
                connection = self._connected[descriptor]
                if self._receive(connection):
                    idle.append(connection)
            if now - looked > 1e9:
                idle.extend(self._give_up(now))
                looked = now
        return self._outcome(began, cpu, [*idle, *(connection for _, connection in resting)])

    def open(self, rate: float, seconds: float, *, seed: int = 0) -> Outcome:
        """Requests at random times (Poisson), `rate` a second on average, for so long; then waits for the answers."""
        # The one that was used last is used first: those that the server may have closed meanwhile rest.
        idle = [_Connection() for _ in range(MOST_CONNECTIONS)]
        due = _arrivals(rate, seconds, seed)
        cpu, began = time.process_time_ns(), time.perf_counter_ns()
        looked, index = began, 0
        while index < len(due) or self._out:
            now = time.perf_counter_ns()
            while index < len(due) and idle and began + due[index] <= now:
                connection = idle.pop()
                if self._is_ended(connection):
                    self._close(connection)
                if not self._send(connection, began + due[index]):
                    idle.insert(0, connection)
                index += 1
            waits = index < len(due) and idle
            pause = max(began + due[index] - time.perf_counter_ns(), 0) / 1e9 if waits else 1
            # epoll itself sleeps in whole milliseconds, select in microseconds.
            if not select.select([self._epoll], [], [], min(pause, 1))[0]:
                if now - looked > 1e9:
                    idle.extend(self._give_up(now))
                    looked = now
                continue
            for descriptor, _ in self._epoll.poll(0):
                connection = self._connected[descriptor]
                if self._receive(connection):
                    idle.append(connection)
        return self._outcome(began, cpu, idle, due=len(due))

    def _send(self, connection: _Connection, since: int) -> bool:
        """Sends the next request; False where it could not, which is an error of the request."""
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        try:
            stream = connection.socket or self._connect(connection)
            stream.sendall(request)
        except OSError as error:
            self._fail(connection, "refused" if isinstance(error, ConnectionRefusedError) else "broken")
            return False
        connection.since, connection.out = since, True
        self._out += 1
        return True

    def _is_ended(self, connection: _Connection) -> bool:
        """Whether the server ended it while it rested, as it may: then a request goes out on a new one."""
        if connection.socket is None:
            return False
        try:
            return connection.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _receive(self, connection: _Connection) -> bool:
        """Takes what came; whether that ended the request that was out on it, by an answer or by an error."""
        stream = connection.socket
        assert stream is not None  # noqa: S101 - it is connected
        try:
            came = stream.recv(65536)
        except OSError:
            came = b""
        if not connection.out:
            # The server ends a connection on which nothing was asked: its right, and no failed request.
            self._close(connection)
            return False
        data = connection.buffer + came if connection.buffer else came
        end = data.find(_END_OF_HEAD)
        if came and end < 0:
            connection.buffer = data
            return False
        head = data[:end].lower()
        start = head.find(_LENGTH)
        if not came or start < 0:
            self._fail(connection, "broken" if not came else "no length")
            return True
        stop = head.find(b"\r\n", start + 2)
        if len(data) < end + 4 + int(head[start + len(_LENGTH) : None if stop < 0 else stop]):
            connection.buffer = data
            return False
        self._last = time.perf_counter_ns()
        status = data[9:12].decode("latin-1")
        self._answered[status] += 1
        if status == "200":
            self._latencies.append(self._last - connection.since)
        connection.buffer, connection.out = b"", False
        self._out -= 1
        if b"\r\nconnection: close" in head:
            self._close(connection)
        return True

    def _connect(self, connection: _Connection) -> socket.socket:
        stream = socket.create_connection(self._address, timeout=5)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A request fits into the kernel's buffer, and what is read was announced: nothing blocks.
        stream.settimeout(None)
        connection.socket = stream
        self._connected[stream.fileno()] = connection
        self._epoll.register(stream.fileno(), select.EPOLLIN)
        return stream

    def _fail(self, connection: _Connection, kind: str) -> None:
        self._errors[kind] += 1
        self._last = time.perf_counter_ns()
        self._close(connection)

    def _close(self, connection: _Connection) -> None:
        """Closes it; a request that is out on it is so no more."""
        self._out -= connection.out
        if connection.socket is not None:
            self._epoll.unregister(connection.socket.fileno())
            del self._connected[connection.socket.fileno()]
            connection.socket.close()
        connection.socket, connection.buffer, connection.out = None, b"", False

    def _give_up(self, now: int) -> list[_Connection]:
        """Ends the requests that wait for too long; their connections."""
        late = [c for c in self._connected.values() if c.out and now - c.since > self._deadline]
        for connection in late:
            self._fail(connection, "no answer in time")
        return late

    def _outcome(self, began: int, cpu: int, connections: Sequence[_Connection], due: int | None = None) -> Outcome:
        cpu = time.process_time_ns() - cpu
        for connection in connections:
            self._close(connection)
        self._epoll.close()
        seconds = max(self._last - began, 1) / 1e9
        return Outcome(
            sent=self._sent,
            answered=dict(self._answered),
            errors=dict(self._errors),
            seconds=seconds,
            per_second=self._answered["200"] / seconds,
            latency_ms=_latency(self._latencies),
            cpu_us=cpu / 1000 / max(self._sent, 1),
            due=due,
        )


def post(host: str, path: str, content_type: str, body: bytes) -> bytes:
    """A whole request as it goes over the wire."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def save_requests(folder: Path, requests: Sequence[bytes]) -> None:
    """Writes them for `Load` in another process."""
    folder.mkdir(parents=True)
    for index, request in enumerate(requests):
        (folder / f"{index:05}.http").write_bytes(request)


def read_requests(folder: Path) -> list[bytes]:
    """What `save_requests` wrote, in its order."""
    return [path.read_bytes() for path in sorted(folder.glob("*.http"))]


def _arrivals(rate: float, seconds: float, seed: int) -> list[int]:
    """Nanoseconds from the start, ascending: a Poisson process."""
    draw = random.Random(seed)  # noqa: S311 - arrivals, no secret
    times: list[int] = []
    now = draw.expovariate(rate)
    while now < seconds:
        times.append(int(now * 1e9))
        now += draw.expovariate(rate)
    return times


def _latency(nanoseconds: list[int]) -> dict[str, float]:
    """Exact quantiles (nearest rank) in ms."""
    ordered = sorted(nanoseconds)
    if not ordered:
        return dict.fromkeys(("p50", "p90", "p99", "max", "mean"), math.nan)
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = {name: ordered[max(math.ceil(share * len(ordered)) - 1, 0)] / 1e6 for name, share in ranks.items()}
    return {**found, "mean": sum(ordered) / len(ordered) / 1e6}


def _main() -> None:
    job = json.loads(sys.stdin.readline())
    load = Load((job["host"], job["port"]), read_requests(Path(job["requests"])))
    gc.collect()
    gc.disable()
    if "rate" in job:
        outcome = load.open(job["rate"], job["seconds"], seed=job["seed"])
    elif job["seconds"] is None:
        outcome = load.closed(job["clients"], math.inf, until=sys.stdin.fileno())
    else:
        outcome = load.closed(job["clients"], job["seconds"])
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    _main()
