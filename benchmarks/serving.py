"""Serving speed against its peers and its limit: `make bench-serve`.

One VGG16 and the same PNG files for all: our server as it is deployed, with its log in PostgreSQL, on the fp32 and on
the int8 file; BentoML with adaptive batching on the same two files and threads; `mlflow models serve` and a plain
Flask with `model.predict` on the Keras model. The limit is a bare ONNX Runtime session in a loop on decoded arrays.

Rounds alternate between all of them, each round in another order, what runs the same file in direct succession; ratios
are taken within a round, and their median is what is held against a bound. All servers stay up, and rest while one is
measured: what each takes at rest is among the figures. A load is a warm-up, then closed loops with 1, 8 and 32 clients,
then open loops at shares of what the server has just answered to 32 clients (`benchmarks.load`).

`--soak MINUTES` is a run of its own, which adds its figures to those of the last benchmark.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.load import save_requests
from benchmarks.result import RESULTS_DIR, Result, Spread, Target, write
from benchmarks.serving_contenders import (
    Contender,
    bentoml,
    database_server,
    flask,
    mlflow,
    ours,
    started,
)
from benchmarks.serving_figures import (
    FULL_LOAD,
    PRECISIONS,
    account,
    add_soak,
    figures_of,
    growth,
    ratios_of,
    soak_targets,
    table,
    targets_of,
)
from benchmarks.serving_limit import THREADS
from benchmarks.serving_measurements import (
    FULL,
    QUICK,
    Limit,
    Loaded,
    Plan,
    by_wrk,
    generator_cost,
    idle_cpu,
    logged_rows,
    measure_round,
    ready_seconds,
    require_one_model,
    swaps_under_load,
)
from ml.datasets import synthetic
from ml.datasets.cifar10 import load_cifar10
from ml.registry.provenance import code_state
from ml.serving.testing import FolderSource
from ml.settings import PROJECT_ROOT, load_settings

logger = logging.getLogger("benchmarks.serving")

LOOKS = 360
"""At the memory, in a soak of any length."""


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
        generator = generator_cost(work / "requests" / loaded[0].name, plan.warm)
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
            "threads": THREADS,
            "ratios": ratios,
            **figures,
            "ready_seconds": Spread.of(ready),
            "swaps_under_load": swaps,
            "accounts": accounts,
            "generator": {"cpu_us_by_clients": generator, "by_wrk": checked},
        },
        targets=targets_of(
            ratios,
            ready=Spread.of(ready),
            memory={item.name: memory[item.name]["rss"] for item in our_servers.values()},
            swaps_failed=cast(int, swaps["failed"]),
            unaccounted=sum(account["unaccounted"] for account in accounts.values()),
        ),
    )


def soak(minutes: float, work: Path) -> tuple[dict[str, object], list[Target]]:
    """32 clients ask the int8 model without a pause, and its memory is watched.

    Args:
        minutes: for how long.
        work: as of `run`.
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
        with loaded.loading(clients=FULL_LOAD, seconds=None) as end:
            began = time.monotonic()
            while (passed := time.monotonic() - began) < minutes * 60:
                at.append(passed / 60)
                memory.append(loaded.server.memory_mb())
                time.sleep(minutes * 60 / LOOKS)
            outcome = end()
        accounted = _account(loaded, url)
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
        "account": accounted,
        **asdict(outcome),
    }
    return figures, soak_targets(grown, outcome.failed, accounted["unaccounted"])


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
    answered = loaded.answered["200"]
    return account(loaded.sent, answered, logged_rows(database_url, answered))


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
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
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
