"""What the serving benchmark's measurements come to: medians and spreads, ratios, targets, the table.

Pure functions of what was measured; measuring is `benchmarks.serving_measurements`'s.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.load import Outcome
from benchmarks.result import Spread, Target
from ml.files import write_whole

PRECISIONS = ("fp32", "int8")
CLIENTS = (1, 8, 32)
FULL_LOAD = 32
SHARES = (0.5, 0.7, 0.9)
"""Of the closed loop's throughput at full load, for the open loops."""
BATCHES = (1, 8, 16, 32)
"""Of the limit, each with one session in a loop (the limit that was asked for), and with a loop for each core."""
PERCENTILES = ("p50", "p90", "p99")

THROUGHPUT_BOUND, LATENCY_BOUND = 0.85, 1.35
"""Of the limit, at full load and alone."""
FLASK_BOUND, MLFLOW_BOUND, INT8_BOUND = 15, 16, 25
READY_BOUND_S, MEMORY_BOUND_MB = 3.0, 400.0
GROWTH_BOUND_MB = 10.0
"""In 30 minutes, at the upper end of the interval: less than the allocator's own breathing."""


@dataclass
class Round:
    """What one round measured: of each contender by clients and by share; of each limit by batch size."""

    closed: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    open: dict[str, dict[float, Outcome]] = field(default_factory=dict)
    cpu_ms: dict[str, dict[int, float]] = field(default_factory=dict)
    """CPU time of the server's processes for each answer of the closed loops."""
    limit: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    apart: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    """As `limit`, with a session and a loop for each core."""


def figures_of(rounds: Sequence[Round]) -> dict[str, object]:
    """Medians and spreads over the rounds."""
    figures: dict[str, Any] = {"limit": {}, "contenders": {}}
    for precision in sorted(rounds[0].limit):
        figures["limit"][precision] = {
            "best_per_second": Spread.of(_best([item.limit[precision] for item in rounds])),
            "by_batch": _by_batch([item.limit[precision] for item in rounds]),
            "a_session_for_each_core": {
                "best_per_second": Spread.of(_best([item.apart[precision] for item in rounds])),
                "by_batch": _by_batch([item.apart[precision] for item in rounds]),
            },
        }
    for name in sorted(rounds[0].closed, key=lambda name: (not name.startswith("ours"), name)):
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
        found[f"{precision}: throughput at 32 clients over the limit"] = _ratio(
            rate, _best([item.limit[precision] for item in rounds])
        )
        found[f"{precision}: throughput at 32 clients over a bare session on each core"] = _ratio(
            rate, _best([item.apart[precision] for item in rounds])
        )
        found[f"{precision}: p50 alone over the bare session's"] = _ratio(alone, bare)
        found[f"{precision}: throughput at 32 clients over plain Flask's"] = _ratio(rate, _rates(rounds, "flask"))
        found[f"{precision}: throughput at 32 clients over MLflow's"] = _ratio(rate, _rates(rounds, "mlflow"))
        found[f"{precision}: throughput at 32 clients over BentoML's"] = _ratio(rate, _rates(rounds, bento))
        found[f"{precision}: BentoML's p50 alone over ours"] = _ratio(_alone(rounds, bento), alone)
    return found


def account(sent: int, answered: int, logged: int) -> dict[str, int]:
    """Whether requests sent, answered with 200, and logged add up: each is one image, so one row.

    `unaccounted` counts both what was sent and not answered, and rows too few or too many.
    """
    unaccounted = abs(sent - answered) + abs(answered - logged)
    return {"sent": sent, "answered": answered, "logged": logged, "unaccounted": unaccounted}


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
        apart = found["a_session_for_each_core"]["best_per_second"]
        rows.append(f"| limit_{precision}, a session for each core | {_in_words(apart)} | | | | | | |")
    rows += ["", "| wanted | measured | bound | |", "|---|---|---|---|"]
    rows += [
        f"| {t['name']} | {t['value']:.3g} | {t['op']} {t['bound']:g} | {'' if t['holds'] else '**not reached**'} |"
        for t in result["targets"]
    ]
    return "\n".join(rows)


def add_soak(path: Path, figures: Mapping[str, object], targets: Sequence[Target]) -> None:
    """Adds a soak to the file of a benchmark, in place of an earlier one."""
    written = json.loads(path.read_text())
    written["figures"]["soak"] = figures
    kept = [target for target in written["targets"] if not target["name"].startswith("soak: ")]
    written["targets"] = kept + [asdict(target) | {"holds": target.holds} for target in targets]
    write_whole(path, json.dumps(written, indent=1) + "\n")


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


def _by_batch(limits: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[str, dict[str, Spread]]:
    return {
        str(batch): {key: Spread.of([limit[batch][key] for limit in limits]) for key in limits[0][batch]}
        for batch in limits[0]
    }


def _best(limits: Sequence[Mapping[int, Mapping[str, float]]]) -> list[float]:
    """Throughput in each round, of the batch size that is best over all of them: not of each round's luckiest."""
    rates = ([limit[batch]["per_second"] for limit in limits] for batch in limits[0])
    return max(rates, key=statistics.median)


def _ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(over, under, strict=True)])


def _in_words(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.0f} [{spread['min']:.0f}, {spread['max']:.0f}]"
