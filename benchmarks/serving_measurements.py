"""One measurement each: a round of all contenders, a start, swaps under load, the log's rows.

What they come to is `benchmarks.serving_figures`'s; in which order they are taken, `benchmarks.serving`'s.
"""

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, cast

import httpx
import numpy as np
import onnxruntime as ort

from benchmarks.load import Outcome
from benchmarks.result import Spread
from benchmarks.serving_contenders import HOST, Contender, Server, started
from benchmarks.serving_figures import BATCHES, CLIENTS, FULL_LOAD, PRECISIONS, SHARES, Round
from benchmarks.serving_limit import THREADS
from ml.database import transaction
from ml.serving.testing import FolderSource
from ml.settings import PROJECT_ROOT

logger = logging.getLogger("benchmarks.serving")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; times in seconds."""

    rounds: int
    closed: float
    open: float
    warm: float
    limit: float
    """For each batch size."""
    starts: int
    swaps: int
    images: int


FULL = Plan(rounds=5, closed=5, open=4, warm=1, limit=2, starts=5, swaps=10, images=200)
QUICK = Plan(rounds=1, closed=1, open=1, warm=0.3, limit=0.3, starts=1, swaps=2, images=64)


class Limit:
    """A bare session in a process that measures when asked, and waits."""

    def __init__(self, model: Path, images: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving_limit", str(model), str(images)],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._in, self._out = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)

    def __enter__(self) -> "Limit":
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._process.wait(20)
        self._out.close()

    def measure(self, loops: int, batch: int, seconds: float) -> dict[str, float]:
        """As `benchmarks.serving_limit.measure_together`.

        Raises:
            RuntimeError: it ended; it said why on stderr.
        """
        self._in.write(json.dumps({"loops": loops, "batch": batch, "seconds": seconds}) + "\n")
        self._in.flush()
        line = self._out.readline()
        if not line:
            raise RuntimeError(f"The limit ended with {self._process.wait()}; its last words stand above.")
        found: dict[str, float] = json.loads(line)
        return found


@contextmanager
def loading(port: int, requests: Path, **job: object) -> Iterator[Callable[[], Outcome]]:
    """Load on a server from another process.

    It lasts as the job says (`benchmarks.load`), or without an end of its own until what this gives is called; that
    waits for what is still out.

    Raises:
        RuntimeError: by what it gives, where the process failed; it said why on stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load"],
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin = cast(TextIO, process.stdin)
    stdin.write(json.dumps({"host": HOST, "port": port, "requests": str(requests), **job}) + "\n")
    stdin.flush()

    def outcome() -> Outcome:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"The load ended with {process.returncode}; it said why above.")
        return Outcome(**json.loads(said))

    try:
        yield outcome
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Loaded:
    """A server under test: what is sent to it, and all that came of it."""

    def __init__(self, server: Server, requests: Path) -> None:
        self.server, self._requests = server, requests
        self.sent = 0
        self.answered: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """The contender's."""
        return self.server.contender.name

    def closed(self, clients: int, seconds: float) -> Outcome:
        """A closed loop; see `benchmarks.load`."""
        with self.loading(clients=clients, seconds=seconds) as end:
            return end()

    def open(self, rate: float, seconds: float, seed: int) -> Outcome:
        """An open loop; see `benchmarks.load`."""
        with self.loading(rate=rate, seconds=seconds, seed=seed) as end:
            return end()

    @contextmanager
    def loading(self, **job: object) -> Iterator[Callable[[], Outcome]]:
        """As the function of that name, counted."""
        with loading(self.server.contender.port, self._requests, **job) as end:

            def outcome() -> Outcome:
                found = end()
                self._count(found)
                return found

            yield outcome

    def _count(self, outcome: Outcome) -> None:
        self.sent += outcome.sent
        self.answered.update(outcome.answered)
        self.errors.update(outcome.errors)

    def ask(self, image: np.ndarray) -> list[float]:
        """The ten probabilities of one image."""
        contender = self.server.contender
        head, _, body = contender.request(image).partition(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        kind = next(line for line in head.decode().split("\r\n") if line.startswith("Content-Type: "))
        headers = {"Content-Type": kind.removeprefix("Content-Type: ")}
        reply = httpx.post(contender.url + path, content=body, headers=headers, timeout=60, trust_env=False)
        self.sent += 1
        self.answered[str(reply.status_code)] += 1
        reply.raise_for_status()
        return list(contender.probabilities(reply.json()))

    def figures(self) -> dict[str, object]:
        """All requests of the run, and what came of them."""
        return {"sent": self.sent, "answered": dict(self.answered), "errors": dict(self.errors)}


def require_one_model(loaded: Sequence[Loaded], models: Path, images: np.ndarray) -> None:
    """Checks that all serve the model that they are meant to.

    Raises:
        RuntimeError: one says something else than a bare session on the same file.
    """

    for precision in PRECISIONS:
        session = ort.InferenceSession(str(models / f"{precision}.onnx"), providers=["CPUExecutionProvider"])
        expected = session.run(None, {session.get_inputs()[0].name: images.astype(np.float32)})[0]
        for server in loaded:
            if server.server.contender.precision == precision:
                distance = np.abs(np.array([server.ask(image) for image in images]) - expected).max()
                if not distance < 1e-3:
                    raise RuntimeError(f"{server.name} differs from the {precision} file by {distance:.4f}.")


def measure_round(
    number: int, plan: Plan, loaded: Sequence[Loaded], limits: Mapping[str, Limit], batches: Sequence[int] = BATCHES
) -> Round:
    """One round, in an order of its own."""
    found = Round()
    draw = random.Random(number)  # noqa: S311 - an order, no secret
    # What is compared closely is measured closely together: speeds of a shared machine drift within a round.
    groups: dict[str, list[Loaded | str]] = {precision: [precision] for precision in limits}
    for item in loaded:
        precision = item.server.contender.precision
        groups.setdefault(precision if item.name.endswith(precision) else item.name, []).append(item)
    order = draw.sample(sorted(groups), len(groups))
    turns = [turn for name in order for turn in draw.sample(groups[name], len(groups[name]))]
    for turn in turns:
        if isinstance(turn, str):
            for loops, into in ((1, found.limit), (THREADS, found.apart)):
                into[turn] = {batch: limits[turn].measure(loops, batch, plan.limit) for batch in batches}
            best = max(found.limit[turn].values(), key=lambda figures: figures["per_second"])
            logger.info("round %d: limit %s: %.0f images/s", number, turn, best["per_second"])
            continue
        turn.closed(FULL_LOAD, plan.warm)
        closed, cpu = found.closed.setdefault(turn.name, {}), found.cpu_ms.setdefault(turn.name, {})
        for clients in CLIENTS:
            before = turn.server.cpu_seconds()
            closed[clients] = turn.closed(clients, plan.closed)
            cpu[clients] = (turn.server.cpu_seconds() - before) * 1000 / max(closed[clients].ok, 1)
        rate = closed[FULL_LOAD].per_second
        found.open[turn.name] = {share: turn.open(max(rate * share, 1), plan.open, seed=number) for share in SHARES}
        logger.info("round %d: %s: %.0f images/s, alone %.1f ms", number, turn.name, rate, closed[1].latency_ms["p50"])
    return found


def ready_seconds(contender: Contender, log: Path, starts: int) -> list[float]:
    """Times from the start of the process to its readiness, the model's file on this machine already."""
    seconds = []
    for _ in range(starts):
        with started(contender, log) as server:
            seconds.append(server.ready_seconds)
    return seconds


def idle_cpu(loaded: Sequence[Loaded], seconds: float = 3) -> dict[str, float]:
    """Share of one core that each server takes while nobody asks it."""
    before = [item.server.cpu_seconds() for item in loaded]
    time.sleep(seconds)
    return {item.name: (item.server.cpu_seconds() - then) / seconds for item, then in zip(loaded, before, strict=True)}


def generator_cost(requests: Path, seconds: float) -> dict[str, float]:
    """CPU time of the load generator for one request, in us, by clients: on a server that does nothing else."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.responder"],
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as responder:
        port = int(cast(TextIO, responder.stdout).readline())
        found = {}
        for clients in CLIENTS:
            with loading(port, requests, clients=clients, seconds=seconds) as end:
                found[str(clients)] = end().cpu_us
        cast(TextIO, responder.stdin).close()
    return found


def swaps_under_load(
    loaded: Loaded, source: FolderSource, models: Path, count: int, pause: float = 1.0
) -> dict[str, object]:
    """Swaps the champion so many times between the fp32 and the int8 file while 32 clients ask without a pause.

    Raises:
        RuntimeError: a version was not served within 30 s.
    """
    seconds = []
    with loaded.loading(clients=FULL_LOAD, seconds=None) as end:
        time.sleep(pause)
        for number in range(1, count + 1):
            version = number + 1  # the first serves already
            source.crown(models / f"{PRECISIONS[number % 2]}.onnx", version)
            began = time.perf_counter()
            while _version(loaded.server.contender.url) != version:
                if time.perf_counter() - began > 30:
                    raise RuntimeError(f"Version {version} was not served within 30 s.")
                time.sleep(0.05)
            seconds.append(time.perf_counter() - began)
            time.sleep(pause)
        outcome = end()
    return {"swaps": count, "seconds_until_it_answers": Spread.of(seconds), "failed": outcome.failed, **asdict(outcome)}


def logged_rows(database_url: str, expected: int, patience: float = 60) -> int:
    """Rows in the prediction log, once there are `expected` of them, or no more come."""
    deadline = time.monotonic() + patience
    while True:
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM predictions")
            rows = int(cursor.fetchone()[0])
        if rows >= expected or time.monotonic() > deadline:
            return rows
        time.sleep(0.5)


def by_wrk(loaded: Loaded, image: np.ndarray, folder: Path, seconds: float) -> dict[str, object] | None:
    """What wrk, a load generator in C, finds at full load: a check on ours. None where it is not installed."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return None
    body, script = folder / "body.png", folder / "post.lua"
    body.write_bytes(loaded.server.contender.request(image).partition(b"\r\n\r\n")[2])
    script.write_text(
        f'local file = io.open("{body}", "rb")\n'
        'wrk.method, wrk.body, wrk.headers["Content-Type"] = "POST", file:read("*a"), "image/png"\n'
    )
    command = [wrk, "-t1", f"-c{FULL_LOAD}", f"-d{seconds:.0f}s", "-s", str(script), loaded.server.contender.url]
    command[-1] += "/v1/predict"
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = next(line.split()[1] for line in said.splitlines() if line.startswith("Requests/sec"))
    return {"per_second": float(rate), "refused": "Non-2xx" in said}


def _version(url: str) -> int:
    version: int = httpx.get(f"{url}/v1/model", timeout=30, trust_env=False).raise_for_status().json()["version"]
    return version
