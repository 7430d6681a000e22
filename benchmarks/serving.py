"""Serving speed against its peers and its limit: `make bench-serve`.

One VGG16 and the same PNG files for all: our server as it is deployed, with its log in PostgreSQL, on the fp32 and on
the int8 file; BentoML with adaptive batching on the same two files and threads; `mlflow models serve` and a plain
Flask with `model.predict` on the Keras model. The limit is a bare ONNX Runtime session in a loop on decoded arrays.

Rounds alternate between all of them, each round in another order; ratios are taken within a round, and their median is
what is held against a bound. All servers stay up, and rest while one is measured: what each takes at rest is among the
figures. A load is a warm-up, then closed loops with 1, 8 and 32 clients, then open loops at shares of what the server
has just answered to 32 clients (`benchmarks.load`).

`--soak MINUTES` is a run of its own, which adds its figures to those of the last benchmark.
"""

import argparse
import json
import logging
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

import httpx
import numpy as np
from scipy import stats

from benchmarks.load import Outcome, save_requests
from benchmarks.result import RESULTS_DIR, Result, Spread, Target, write
from benchmarks.serving_contenders import (
    HOST,
    Contender,
    Server,
    bentoml,
    database_server,
    flask,
    mlflow,
    ours,
    started,
)
from ml.database import transaction
from ml.datasets import synthetic
from ml.datasets.cifar10 import load_cifar10
from ml.files import write_whole
from ml.registry.provenance import code_state
from ml.serving.engine import SERVER_THREADS
from ml.serving.testing import FolderSource
from ml.settings import PROJECT_ROOT, load_settings

logger = logging.getLogger("benchmarks.serving")

PRECISIONS = ("fp32", "int8")
CLIENTS = (1, 8, 32)
FULL_LOAD = 32
SHARES = (0.5, 0.7, 0.9)
"""Of the closed loop's throughput at full load, for the open loops."""
BATCHES = (1, 8, 16, 32)
PERCENTILES = ("p50", "p90", "p99")

THROUGHPUT_BOUND, LATENCY_BOUND = 0.85, 1.35
"""Of the limit, at full load and alone."""
FLASK_BOUND, MLFLOW_BOUND, INT8_BOUND = 15, 16, 25
READY_BOUND_S, MEMORY_BOUND_MB = 3.0, 400.0
GROWTH_BOUND_MB = 10.0
"""In 30 minutes, at the upper end of the interval: less than the allocator's own breathing."""


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


@dataclass
class Round:
    """What one round measured: of each contender by clients and by share; of each limit by batch size."""

    closed: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    open: dict[str, dict[float, Outcome]] = field(default_factory=dict)
    cpu_ms: dict[str, dict[int, float]] = field(default_factory=dict)
    """CPU time of the server's processes for each answer of the closed loops."""
    limit: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)


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

    def measure(self, batch: int, seconds: float) -> dict[str, float]:
        """As `benchmarks.serving_limit.measure`.

        Raises:
            RuntimeError: it ended; it said why on stderr.
        """
        self._in.write(json.dumps({"batch": batch, "seconds": seconds}) + "\n")
        self._in.flush()
        line = self._out.readline()
        if not line:
            raise RuntimeError(f"The limit ended with {self._process.wait()}; its last words stand above.")
        found: dict[str, float] = json.loads(line)
        return found


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
        with self.loading(clients=clients, seconds=seconds) as load:
            return load()

    def open(self, rate: float, seconds: float, seed: int) -> Outcome:
        """An open loop; see `benchmarks.load`."""
        with self.loading(rate=rate, seconds=seconds, seed=seed) as load:
            return load()

    @contextmanager
    def loading(self, **job: object) -> Iterator[Any]:
        """Load from another process, until what this gives is called; that ends it and returns the `Outcome`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = json.dumps({"host": HOST, "port": self.server.contender.port, "requests": str(self._requests), **job})
        stdin = cast(TextIO, process.stdin)
        stdin.write(told + "\n")
        stdin.flush()

        def outcome() -> Outcome:
            said, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"The load on {self.name} ended with {process.returncode}; it said why above.")
            found = Outcome(**json.loads(said))
            self._count(found)
            return found

        try:
            yield outcome
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

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
    import onnxruntime as ort  # noqa: PLC0415 - it starts threads, which the unit tests need not

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
    turns: list[Loaded | str] = [*loaded, *limits]
    random.Random(number).shuffle(turns)  # noqa: S311 - an order, no secret
    for turn in turns:
        if isinstance(turn, str):
            found.limit[turn] = {batch: limits[turn].measure(batch, plan.limit) for batch in batches}
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


def swaps_under_load(
    loaded: Loaded, source: FolderSource, models: Path, count: int, pause: float = 1.0
) -> dict[str, object]:
    """Swaps the champion so many times between the fp32 and the int8 file while 32 clients ask without a pause.

    Raises:
        RuntimeError: a version was not served within 30 s.
    """
    seconds = []
    with loaded.loading(clients=FULL_LOAD, seconds=None) as load:
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
        outcome = load()
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


def figures_of(rounds: Sequence[Round]) -> dict[str, object]:
    """Medians and spreads over the rounds."""
    figures: dict[str, Any] = {"limit": {}, "contenders": {}}
    for precision in rounds[0].limit:
        by_batch = {
            str(batch): {
                key: Spread.of([item.limit[precision][batch][key] for item in rounds])
                for key in ("per_second", "p50_ms", "p99_ms")
            }
            for batch in rounds[0].limit[precision]
        }
        figures["limit"][precision] = {"best_per_second": Spread.of(_best(rounds, precision)), "by_batch": by_batch}
    for name in rounds[0].closed:
        closed = {
            str(clients): {
                **_spreads([item.closed[name][clients] for item in rounds]),
                "server_cpu_ms": Spread.of([item.cpu_ms[name][clients] for item in rounds]),
            }
            for clients in rounds[0].closed[name]
        }
        open_loops = {
            f"{share:.0%}": {
                "asked_per_second": Spread.of([share * item.closed[name][FULL_LOAD].per_second for item in rounds]),
                **_spreads([item.open[name][share] for item in rounds]),
            }
            for share in rounds[0].open[name]
        }
        figures["contenders"][name] = {"closed": closed, "open": open_loops}
    return figures


def ratios_of(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Ours against the limit and the peers, within each round."""
    found: dict[str, Spread] = {}
    for precision in PRECISIONS:
        mine, bento = f"ours_{precision}", f"bentoml_{precision}"
        rate = _rates(rounds, mine)
        alone = _alone(rounds, mine)
        bare = [item.limit[precision][1]["p50_ms"] for item in rounds]
        found[f"{precision}: throughput at 32 clients over the limit"] = _ratio(rate, _best(rounds, precision))
        found[f"{precision}: p50 alone over the bare session's"] = _ratio(alone, bare)
        found[f"{precision}: throughput at 32 clients over plain Flask's"] = _ratio(rate, _rates(rounds, "flask"))
        found[f"{precision}: throughput at 32 clients over MLflow's"] = _ratio(rate, _rates(rounds, "mlflow"))
        found[f"{precision}: throughput at 32 clients over BentoML's"] = _ratio(rate, _rates(rounds, bento))
        found[f"{precision}: BentoML's p50 alone over ours"] = _ratio(_alone(rounds, bento), alone)
    return found


def targets_of(
    ratios: Mapping[str, Spread], *, ready: Spread, memory: Mapping[str, float], swaps_failed: int, unaccounted: int
) -> list[Target]:
    """Each bound that was asked for."""
    targets = []
    for precision in PRECISIONS:
        flask_bound, mlflow_bound = (FLASK_BOUND, MLFLOW_BOUND) if precision == "fp32" else (INT8_BOUND, INT8_BOUND)
        bounds: tuple[tuple[str, Any, float], ...] = (
            ("throughput at 32 clients over the limit", ">=", THROUGHPUT_BOUND),
            ("p50 alone over the bare session's", "<=", LATENCY_BOUND),
            ("throughput at 32 clients over plain Flask's", ">=", flask_bound),
            ("throughput at 32 clients over MLflow's", ">=", mlflow_bound),
            ("throughput at 32 clients over BentoML's", ">=", 1.0),
            ("BentoML's p50 alone over ours", ">=", 1.0),
        )
        for what, op, bound in bounds:
            name = f"{precision}: {what}"
            targets.append(Target(name, ratios[name].median, op, bound))
    targets += [
        Target(f"{name}: resident memory after the load, MB", mb, "<=", MEMORY_BOUND_MB) for name, mb in memory.items()
    ]
    return [
        *targets,
        Target("seconds from the start of the process to ready", ready.median, "<=", READY_BOUND_S),
        Target("failed requests in ten swaps under full load", swaps_failed, "<=", 0),
        Target("requests sent, and not both answered and in the log", unaccounted, "<=", 0),
    ]


def growth(minutes: Sequence[float], megabytes: Sequence[float], *, blocks: int = 24) -> dict[str, float]:
    """How memory grows: a line through the means of equal blocks of time, after the first tenth.

    Neighbouring samples say nearly the same, so they are not counted as if each told something new; of blocks the
    usual interval of a slope (t, 95 %) is nearly right.

    Args:
        minutes: when each sample was taken, ascending.
        megabytes: of memory.
        blocks: so many, where there are samples enough.

    Returns:
        `mb_in_30_minutes`, `low`, `high`: the slope and its interval; NaN where there are too few samples.
    """
    start = len(minutes) // 10
    kept = np.array([minutes[start:], megabytes[start:]])
    blocks = min(blocks, kept.shape[1] // 2)
    if blocks < 3:
        return dict.fromkeys(("mb_in_30_minutes", "low", "high"), float("nan"))
    x, y = np.array([part.mean(axis=1) for part in np.array_split(kept, blocks, axis=1)]).T
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, blocks - 2) * line.stderr)
    return {
        "mb_in_30_minutes": 30 * float(line.slope),
        "low": 30 * (float(line.slope) - half),
        "high": 30 * (float(line.slope) + half),
    }


def soak_targets(grown: Mapping[str, float], failed: int, unaccounted: int) -> list[Target]:
    """Each bound on a soak."""
    return [
        Target("soak: growth of memory in 30 minutes, MB, upper end", grown["high"], "<=", GROWTH_BOUND_MB),
        Target("soak: failed requests", failed, "<=", 0),
        Target("soak: requests sent, and not both answered and in the log", unaccounted, "<=", 0),
    ]


def run(plan: Plan, work: Path, kind: str) -> Result:
    """All of it but the soak.

    Args:
        plan: how much.
        work: a folder that holds models/images.npy, uint8 (n, 32, 32, 3).
        kind: what those are, `cifar-10` or `SYNTHETIC`.
    """
    models, logs = work / "models", work / "logs"
    make_models(models)
    images = np.load(models / "images.npy")[: plan.images]
    with ExitStack() as stack:
        stack.enter_context(_keeping_logs(logs))
        database = stack.enter_context(database_server(_folder(work / "database")))
        urls = {precision: database(f"predictions_{precision}") for precision in PRECISIONS}
        sources = {precision: _crowned(work / precision, models / f"{precision}.onnx") for precision in PRECISIONS}
        mine = [ours(precision, work / precision, urls[precision]) for precision in PRECISIONS]
        ready = ready_seconds(mine[0], logs / "starts.log", plan.starts)
        contenders = [
            *mine,
            flask(models),
            mlflow(models),
            *(bentoml(precision, models, work / "bentoml") for precision in PRECISIONS),
        ]
        loaded = [stack.enter_context(_loaded(contender, images, work)) for contender in contenders]
        limits = {p: stack.enter_context(Limit(models / f"{p}.onnx", models / "images.npy")) for p in PRECISIONS}
        require_one_model(loaded, models, images[:8])
        idle = idle_cpu(loaded)
        rounds = [measure_round(number, plan, loaded, limits) for number in range(plan.rounds)]
        memory = {item.name: item.server.memory_mb() for item in loaded}
        our_servers = {item.server.contender.precision: item for item in loaded if item.name.startswith("ours_")}
        swaps = swaps_under_load(our_servers["fp32"], sources["fp32"], models, plan.swaps)
        accounts = {p: _account(item, urls[p]) for p, item in our_servers.items()}
        checked = {p: by_wrk(item, images[0], work, plan.closed) for p, item in our_servers.items()}
        ratios = ratios_of(rounds)
        figures = figures_of(rounds)
        for item in loaded:
            cast(dict[str, Any], figures["contenders"])[item.name] |= {
                "requests": item.figures(),
                "memory_mb": memory[item.name],
                "idle_cpu_cores": idle[item.name],
            }
    return Result(
        name="serving",
        n=plan.rounds,
        data=kind,
        figures={
            "model": "VGG16, 32x32, random weights",
            "images": len(images),
            "threads": SERVER_THREADS,
            "ratios": ratios,
            **figures,
            "ready_seconds": Spread.of(ready),
            "swaps_under_load": swaps,
            "accounts": accounts,
            "wrk": checked,
        },
        targets=targets_of(
            ratios,
            ready=Spread.of(ready),
            memory={item.name: memory[item.name]["rss"] for item in our_servers.values()},
            swaps_failed=cast(int, swaps["failed"]),
            unaccounted=sum(account["unaccounted"] for account in accounts.values()),
        ),
    )


def soak(minutes: float, work: Path, every: float = 5.0) -> tuple[dict[str, object], list[Target]]:
    """32 clients ask the int8 model without a pause, and its memory is watched.

    Args:
        minutes: for how long.
        work: as of `run`.
        every: seconds between two looks at the memory.
    """
    models, logs = work / "models", work / "logs"
    make_models(models)
    images = np.load(models / "images.npy")
    source = work / "int8"
    at: list[float] = []
    memory: list[dict[str, float]] = []
    with ExitStack() as stack:
        stack.enter_context(_keeping_logs(logs))
        url = stack.enter_context(database_server(_folder(work / "database")))("predictions")
        _crowned(source, models / "int8.onnx")
        loaded = stack.enter_context(_loaded(ours("int8", source, url), images, work))
        with loaded.loading(clients=FULL_LOAD, seconds=None) as load:
            began = time.monotonic()
            while (passed := time.monotonic() - began) < minutes * 60:
                at.append(passed / 60)
                memory.append(loaded.server.memory_mb())
                time.sleep(every)
            outcome = load()
        account = _account(loaded, url)
    rss, pss = ([sample[key] for sample in memory] for key in ("rss", "pss"))
    grown = growth(at, rss)
    code = code_state(PROJECT_ROOT)
    figures: dict[str, object] = {
        "minutes": minutes,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_sha": code.sha,
        "precision": "int8",
        "rss_growth": grown,
        "pss_growth": growth(at, pss),
        "rss_mb": {"first": rss[0], "last": rss[-1], "max": max(rss)},
        "samples": [[round(minute, 2), round(mb, 1)] for minute, mb in zip(at, rss, strict=True)],
        "account": account,
        **asdict(outcome),
    }
    return figures, soak_targets(grown, outcome.failed, account["unaccounted"])


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown, for the README; `result` as it stands in the file."""
    contenders, limit = result["figures"]["contenders"], result["figures"]["limit"]
    rows = [
        "| | images/s, 32 clients | 8 | 1 | p50 alone, ms | p99 at 32, ms | p99 at 70 % open, ms | memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in contenders.items():
        closed = found["closed"]
        rates = " | ".join(_in_words(closed[str(n)]["per_second"]) for n in (32, 8, 1))
        latency = " | ".join(
            f"{spread['median']:.1f}"
            for spread in (closed["1"]["p50_ms"], closed["32"]["p99_ms"], found["open"]["70%"]["p99_ms"])
        )
        rows.append(f"| {name} | {rates} | {latency} | {found['memory_mb']['rss']:.0f} |")
    for precision, found in limit.items():
        alone = found["by_batch"]["1"]
        rows.append(
            f"| limit_{precision} | {_in_words(found['best_per_second'])} | | {_in_words(alone['per_second'])} "
            f"| {alone['p50_ms']['median']:.1f} | | | |"
        )
    rows += ["", "| wanted | measured | bound | |", "|---|---|---|---|"]
    rows += [
        f"| {t['name']} | {t['value']:.3g} | {t['op']} {t['bound']:g} | {'' if t['holds'] else '**not reached**'} |"
        for t in result["targets"]
    ]
    return "\n".join(rows)


def make_models(folder: Path) -> None:
    """Makes the files that all serve out of `folder`/images.npy; see `benchmarks.serving_models`."""
    subprocess.run([sys.executable, "-m", "benchmarks.serving_models", str(folder)], cwd=PROJECT_ROOT, check=True)


def save_images(folder: Path, count: int, quick: bool) -> str:
    """Writes `count` test images for all contenders, outside the repository; says what they are."""
    settings = load_settings()
    if quick or settings.cifar10_source == "synthetic":
        raw = synthetic.generate(train=10, test=count)
    else:
        raw = load_cifar10(settings.cifar10_source, settings.cache_dir, allow_stand_in=False)
    order = np.random.default_rng(0).permutation(len(raw.test_images))[:count]
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", raw.test_images[order])
    return raw.data


def add_soak(path: Path, figures: Mapping[str, object], targets: Sequence[Target]) -> None:
    """Adds a soak to the file of a benchmark, in place of an earlier one."""
    written = json.loads(path.read_text())
    written["figures"]["soak"] = figures
    kept = [target for target in written["targets"] if not target["name"].startswith("soak: ")]
    written["targets"] = kept + [asdict(target) | {"holds": target.holds} for target in targets]
    write_whole(path, json.dumps(written, indent=1) + "\n")


@contextmanager
def _loaded(contender: Contender, images: np.ndarray, work: Path) -> Iterator[Loaded]:
    requests = work / "requests" / contender.name
    save_requests(requests, [contender.request(image) for image in images])
    logger.info("starting %s", contender.name)
    with started(contender, _folder(work / "logs") / f"{contender.name}.log") as server:
        yield Loaded(server, requests)


@contextmanager
def _keeping_logs(logs: Path) -> Iterator[None]:
    """Keeps the servers' logs where something goes wrong; the rest of the work folder is gone then."""
    logs.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        kept = Path(tempfile.mkdtemp(prefix="bench-serving-logs-"))
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        logger.error("The servers' logs are kept in %s.", kept)
        raise


def _crowned(folder: Path, model: Path) -> FolderSource:
    source = FolderSource(_folder(folder / "registry"))
    source.crown(model, 1)
    return source


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _account(loaded: Loaded, database_url: str) -> dict[str, int]:
    """Sent, answered, logged: each request is one image, so one row."""
    answered = loaded.answered["200"]
    logged = logged_rows(database_url, answered)
    unaccounted = abs(loaded.sent - answered) + abs(answered - logged)
    return {"sent": loaded.sent, "answered": answered, "logged": logged, "unaccounted": unaccounted}


def _version(url: str) -> int:
    version: int = httpx.get(f"{url}/v1/model", timeout=30, trust_env=False).raise_for_status().json()["version"]
    return version


def _spreads(outcomes: Sequence[Outcome]) -> dict[str, object]:
    answered: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for outcome in outcomes:
        answered.update(outcome.answered)
        errors.update(outcome.errors)
    return {
        "per_second": Spread.of([outcome.per_second for outcome in outcomes]),
        **{f"{p}_ms": Spread.of([outcome.latency_ms[p] for outcome in outcomes]) for p in PERCENTILES},
        "generator_cpu_us": Spread.of([outcome.cpu_us for outcome in outcomes]),
        "sent": sum(outcome.sent for outcome in outcomes),
        "answered": dict(answered),
        "errors": dict(errors),
    }


def _rates(rounds: Sequence[Round], name: str) -> list[float]:
    return [item.closed[name][FULL_LOAD].per_second for item in rounds]


def _alone(rounds: Sequence[Round], name: str) -> list[float]:
    return [item.closed[name][1].latency_ms["p50"] for item in rounds]


def _best(rounds: Sequence[Round], precision: str) -> list[float]:
    """The limit's throughput: of the batch size that is best over all rounds, not of each round's luckiest."""
    sizes = rounds[0].limit[precision]
    rates = {size: [item.limit[precision][size]["per_second"] for item in rounds] for size in sizes}
    return max(rates.values(), key=statistics.median)


def _ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(over, under, strict=True)])


def _in_words(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.0f} [{spread['min']:.0f}, {spread['max']:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; needs --output")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="load for so long, and watch the memory")
    parser.add_argument("--output", type=Path, help=f"the file to write (default {RESULTS_DIR.name}/serving.json)")
    asked = parser.parse_args()
    if asked.quick and asked.output is None:
        parser.error("--quick measures nothing worth keeping: say where to write it, with --output")
    path = asked.output or RESULTS_DIR / "serving.json"
    if asked.soak is not None and not path.exists():
        parser.error(f"{path} is not there, and a soak adds to it: run the benchmark first")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    began, code = time.monotonic(), code_state(PROJECT_ROOT)
    plan = QUICK if asked.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        work = Path(folder)
        kind = save_images(work / "models", plan.images, asked.quick)
        measured = soak(asked.soak, work) if asked.soak is not None else run(plan, work, kind)
    if code_state(PROJECT_ROOT) != code:
        raise SystemExit(
            "The code changed while it was measured: nothing was written. Run it again, and leave it alone."
        )
    if isinstance(measured, Result):
        write(measured, path)
    else:
        add_soak(path, *measured)
    print(table(json.loads(path.read_text())))
    print(f"{path}, {kind} images, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
