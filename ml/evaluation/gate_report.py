"""The gate's evidence on one candidate: a page for people and JSON for programs. Pure: the same report, the same bytes.

Owns what is said and how it is laid out (`gate_report.html.j2`); the pictures are `gate_plots`'s, the decision was
`gate`'s, and where the two are kept is their caller's.
"""

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Any, get_args

import jinja2
import numpy as np

from ml.datasets.labels import CLASS_NAMES
from ml.evaluation import gate_plots as plots
from ml.evaluation.comparison import Comparison
from ml.evaluation.engine_choice import EngineChoice
from ml.evaluation.gate import Champion, Check, Contender, Group, Verdict
from ml.evaluation.gate_policy import GatePolicy
from ml.evaluation.measurement import Measurement
from ml.evaluation.metrics import CALIBRATION_BINS, Metrics, reliability
from ml.evaluation.robustness import Robustness
from ml.evaluation.significance import power_of

SCHEMA = 1
"""Of `as_json`: raised when a key changes its meaning or goes."""

_OUTCOMES = {"promoted": ("blessed", "✓"), "refused": ("refused", "✗"), "pending": ("not judged", "…")}
_GROUPS: dict[Group, tuple[str, str]] = {
    "mechanical": ("Mechanical: can the version be served at all", "No mechanical check was made."),
    "absolute": ("Absolute: is it good enough, whoever serves", "No figure was held to the absolute bounds."),
    "champion": ("Against the champion", "No check against a champion was made."),
    "shadow": ("Shadow: on what users sent", "No check on users' predictions was made."),
}
_FULL_SHADE = 0.2
"""The difference of a cell's accuracy that gets the whole shade."""
_SMALL = 0.00005  # with four decimals it would read as nought


@dataclass(frozen=True)
class GateReport:
    """What the gate knew of one candidate, and what it made of it."""

    at: datetime
    """UTC."""
    dataset_id: str
    data: str
    """`cifar-10` or `SYNTHETIC`, as shown to users."""
    weights: str
    """What the candidate started from, as shown to users."""
    candidate: Contender
    verdict: Verdict
    champion: Champion | None
    """The version that served; None where there was none."""
    measured: Measurement | None
    """Of the candidate; None where it could not be measured."""
    champion_measured: Measurement | None
    policy: GatePolicy
    engine: EngineChoice
    """The form in which the candidate would serve; every figure is of that form."""


@dataclass(frozen=True)
class _Picture:
    title: str
    alt: str
    light: str
    dark: str


@dataclass(frozen=True)
class _Cell:
    """Of a heat map: `shade` is 0..1, `sign` names its colour."""

    text: str
    shade: float
    sign: str = "more"


def as_json(report: GateReport) -> dict[str, Any]:
    """Plain values for `json.dumps(..., allow_nan=False)`: what is NaN or infinite, and what there is not, is None.

    Returns:
        {"schema": 1, "at": ISO 8601 in UTC, "dataset_id", "data", "weights",
        "outcome": "promoted" | "refused" | "pending", "reason",
        "candidate": {"version", "architecture", "dataset_id", "validation_accuracy", "error"},
        "engine": {"engine": "fp32" | "int8", "reason", "comparison": int8 less float32: {"pairs": {"n", "gained",
        "lost"}, "accuracy": {"value", "low", "high"}, "largest_fall", "calibration_error": {"value", "low", "high"},
        "agreement", "fp32": {"median_ms", "p95_ms"}, "int8": likewise} | None},
        "champion": {"version", "architecture", "dataset_id", "error"} | None,
        "checks": [{"name", "group", "holds", "says", "figure", "low", "high", "bound", "unit"}],
        "comparison": {"champion", "pairs": {"n", "gained", "lost"}, "accuracy": {"value", "low", "high"}, "p_value",
        "smallest_seen", "classes": [{"label", "pairs", "recall", "fallen_p"}], "calibration_error",
        "corrupted_accuracy", "power": a sentence on what the test could see} | None,
        "measured": {"metrics": as `Metrics.as_dict`, "calibration_low", "calibration_high", "reliability": [{"low",
        "high", "n", "confidence", "accuracy", "accuracy_low", "accuracy_high"}], "robustness": as `Robustness.as_dict`
        or None} | None, "champion_measured": likewise, "policy": all of it, by section}. Shares lie in 0..1,
        intervals are of 95 %.
    """
    candidate, comparison = report.candidate, report.candidate.comparison
    content = {
        "schema": SCHEMA,
        "at": report.at.isoformat(),
        "dataset_id": report.dataset_id,
        "data": report.data,
        "weights": report.weights,
        "outcome": report.verdict.outcome,
        "reason": report.verdict.reason,
        "candidate": {
            "version": candidate.version,
            "architecture": candidate.architecture,
            "dataset_id": candidate.dataset_id,
            "validation_accuracy": candidate.validation_accuracy,
            "error": candidate.error,
        },
        "engine": asdict(report.engine),
        "champion": None if report.champion is None else asdict(report.champion),
        "checks": [asdict(check) for check in report.verdict.checks],
        "comparison": None
        if comparison is None
        else asdict(comparison) | {"power": power_statement(comparison, report.policy)},
        "measured": _measured(report.measured),
        "champion_measured": _measured(report.champion_measured),
        "policy": report.policy.model_dump(mode="json"),
    }
    plain = _plain(content)
    assert isinstance(plain, dict)  # noqa: S101 - a dict goes in
    return plain


def power_statement(comparison: Comparison, policy: GatePolicy) -> str:
    """A sentence or two on which true differences the test could have seen, and that smaller ones may exist."""
    n, disagreement, seen = comparison.pairs.n, comparison.pairs.disagreement, comparison.smallest_seen
    level, power = policy.champion.level, policy.champion.power
    if disagreement == 0:
        return f"The two are right on the same of {n:,} images: no difference, whatever its size, could be seen here."
    where = f"On {n:,} images, of which {disagreement:.1%} have one model right and the other wrong, the test"
    if power_of(seen, n, disagreement, level) < power - 1e-6:
        return f"{where} does not reach a probability of {power:.0%} for any true difference: one may exist unseen."
    return (
        f"{where} sees a true difference of {seen:.4f} with a probability of {power:.0%}. "
        "A smaller one may exist and go unseen."
    )


def as_html(report: GateReport) -> str:
    """One page that needs nothing else: no script, no other file. For light and dark screens, readable without its
    pictures.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("ml.evaluation").joinpath("gate_report.html.j2").read_text("utf-8"))
    word, mark = _OUTCOMES[report.verdict.outcome]
    comparison = _shown_comparison(report)
    measured = report.measured
    return template.render(
        report=report,
        at=report.at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        word=word,
        mark=mark,
        tally=_tally(report.verdict.checks),
        loud=[name for name in (report.data, report.weights) if _is_loud(name)],
        facts=list(_facts(report)),
        groups=list(_groups(report.verdict.checks)),
        engine_rows=list(_engine_rows(report)),
        comparison=comparison,
        nothing_to_compare=_nothing_to_compare(report),
        forest=comparison and _forest(comparison, report.policy),
        curve=comparison and comparison.smallest_seen > 0 and _curve(comparison, report.policy),
        power=comparison and power_statement(comparison, report.policy),
        unmeasured=_unmeasured(report),
        reliability=measured and _reliability(measured, report.champion_measured),
        confusion=measured and list(_confusion(measured.metrics)),
        class_names=CLASS_NAMES,
        heat=measured and _heat(measured.robustness),
        heat_difference=measured and _heat_difference(measured.robustness, _robustness(report.champion_measured)),
        policy=list(_flat(report.policy.model_dump())),
        number=_number,
        interval=_interval,
    )


def _measured(measured: Measurement | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {
        "metrics": measured.metrics.as_dict(),
        "calibration_low": measured.calibration_low,
        "calibration_high": measured.calibration_high,
        "reliability": [asdict(each) for each in reliability(measured.labels, measured.probabilities)],
        "robustness": None if measured.robustness is None else measured.robustness.as_dict(),
    }


def _plain(value: object) -> object:
    """With lists for tuples, Python's numbers for NumPy's, and None for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _tally(checks: tuple[Check, ...]) -> str:
    failed = [check.name for check in checks if not check.holds]
    if not checks:
        return "No check was made."
    if not failed:
        return f"All {len(checks)} checks hold." if len(checks) > 1 else "The one check that was made holds."
    return f"Of {len(checks)} checks, {len(failed)} {'fails' if len(failed) == 1 else 'fail'}: {', '.join(failed)}."


def _is_loud(word: str) -> bool:
    """Data and weights that say nothing of CIFAR-10 or of transfer learning are in capitals."""
    return word.upper() == word and any(map(str.isalpha, word))


def _facts(report: GateReport) -> Iterator[tuple[str, str, str]]:
    """Name, figure, interval."""
    yield "Serves as", report.engine.engine, "every figure is of this form"
    yield "Validation accuracy", _number(report.candidate.validation_accuracy), "candidates are chosen by it"
    if report.measured is None:
        return
    found, corrupted = report.measured.metrics, report.measured.robustness
    yield "Test accuracy", _number(found.accuracy), _interval(found.accuracy_low, found.accuracy_high)
    calibration = _interval(report.measured.calibration_low, report.measured.calibration_high)
    yield "Calibration error", _number(found.calibration_error), calibration
    if corrupted is not None:
        mean = _interval(corrupted.mean_accuracy_low, corrupted.mean_accuracy_high)
        yield "Accuracy under corruption", _number(corrupted.mean_accuracy), mean
    yield "Test images", f"{found.n:,}", "clean"


def _engine_rows(report: GateReport) -> Iterator[tuple[str, str, str, str]]:
    """Name, figure, interval, and what the policy wants; none where the two forms were not compared."""
    found, wanted = report.engine.comparison, report.policy.int8
    if found is None:
        return
    fell, rose = found.accuracy, found.calibration_error
    yield "accuracy", _number(fell.value, "", True), _interval(fell.low, fell.high, "", True), ""
    upper = f"upper bound with {wanted.confidence:.0%} confidence"
    yield "fall in accuracy, at most", _number(found.largest_fall), upper, f"below {wanted.largest_accuracy_fall:g}"
    risen = f"risen by {wanted.calibration_margin:g} at most"
    yield "calibration error", _number(rose.value, "", True), _interval(rose.low, rose.high, "", True), risen
    yield "images of the same class", _number(found.agreement), f"of {found.pairs.n:,}", ""
    speed = f"{found.fp32.median_ms:.2f} ms to {found.int8.median_ms:.2f} ms"
    yield "times as fast, one image (median)", _number(found.speedup), speed, f"at least {wanted.least_speedup:g}"
    yield "p95 latency, one image", f"{found.int8.p95_ms:.2f} ms", f"float32 {found.fp32.p95_ms:.2f} ms", ""


def _groups(checks: tuple[Check, ...]) -> Iterator[dict[str, object]]:
    for group in get_args(Group):
        title, nothing = _GROUPS[group]
        own = [check for check in checks if check.group == group]
        yield {"name": group, "title": title, "nothing": nothing, "checks": own, "signed": group == "champion"}


def _shown_comparison(report: GateReport) -> Comparison | None:
    found, champion = report.candidate.comparison, report.champion
    return found if found is not None and champion is not None and found.champion == champion.version else None


def _nothing_to_compare(report: GateReport) -> str:
    """Why there is no comparison; empty where there is one."""
    champion = report.champion
    if champion is None:
        return "There was no champion: no version served, and there was nothing to compare this one with."
    who = f"the champion, version {champion.version} ({champion.architecture})"
    if champion.dataset_id != report.dataset_id:
        other = champion.dataset_id or "an unknown dataset"
        return f"Not compared: {who}, belongs to {other}, and its training images may be among these test images."
    if champion.error is not None:
        return f"Not compared: {who}, gave nothing to compare with: {champion.error}."
    if _shown_comparison(report) is None:
        return f"This version was not compared with {who}."
    return ""


def _unmeasured(report: GateReport) -> str:
    """Why there are no figures; empty where there are."""
    if report.measured is not None:
        return ""
    error = report.candidate.error
    return "The version was not measured." if error is None else f"The version could not be measured: {error}."


def _forest(comparison: Comparison, policy: GatePolicy) -> _Picture:
    classes = comparison.classes
    ahead = sum(each.recall.value > 0 for each in classes)
    lowest = min(classes, key=lambda each: each.recall.value)
    level, margin = policy.champion.level, policy.champion.class_margin
    return _picture(
        "Differences against the champion",
        f"Dots with 95 % intervals: accuracy {comparison.accuracy.value:+.4f} overall; recall is higher in {ahead} of "
        f"{len(classes)} classes, and differs most downwards in {lowest.label}, {lowest.recall.value:+.4f}; a class "
        f"may not be shown to have fallen by more than {margin:g}. The table below has every figure.",
        partial(plots.forest, comparison, level, margin),
    )


def _curve(comparison: Comparison, policy: GatePolicy) -> _Picture:
    level, pairs, seen = policy.champion.level, comparison.pairs, comparison.smallest_seen
    chance = power_of(seen, pairs.n, pairs.disagreement, level)
    return _picture(
        "What the test could see",
        f"Curve that rises with the true difference: one of {seen:.4f} is seen with a probability of {chance:.0%}.",
        partial(plots.power_curve, comparison, level, policy.champion.power),
    )


def _reliability(candidate: Measurement, champion: Measurement | None) -> _Picture:
    mine = reliability(candidate.labels, candidate.probabilities)
    theirs = () if champion is None else reliability(champion.labels, champion.probabilities)
    other = "" if champion is None else f", the champion's {champion.metrics.calibration_error:.4f}"
    return _picture(
        "Reliability",
        f"Accuracy against confidence in {CALIBRATION_BINS} intervals, with bars of how many images have it. The "
        f"candidate's calibration error is {candidate.metrics.calibration_error:.4f}{other}.",
        partial(plots.reliability_diagram, mine, theirs),
    )


def _picture(title: str, alt: str, draw: Callable[[plots.Theme], bytes]) -> _Picture:
    return _Picture(title, alt, _data_uri(draw(plots.LIGHT)), _data_uri(draw(plots.DARK)))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _confusion(metrics: Metrics) -> Iterator[tuple[str, list[_Cell]]]:
    for name, row in zip(CLASS_NAMES, metrics.confusion, strict=True):
        yield name, [_Cell(str(count), count / max(sum(row), 1)) for count in row]


def _robustness(measured: Measurement | None) -> Robustness | None:
    return None if measured is None else measured.robustness


def _heat(found: Robustness | None) -> dict[str, Any] | None:
    if found is None:
        return None
    severities = sorted({severity for _, severity in found.cells})
    rows = []
    for name, mean in found.by_corruption.items():
        values = [found.cells.get((name, severity)) for severity in severities]
        cells = [_Cell("–", 0) if value is None else _Cell(f"{value:.3f}", value) for value in values]
        rows.append((_words(name), cells, f"{mean:.3f}"))
    return {"n": found.n, "severities": severities, "rows": rows}


def _heat_difference(mine: Robustness | None, theirs: Robustness | None) -> dict[str, Any] | None:
    """None where one of the two was not measured, or not on as many images."""
    if mine is None or theirs is None or mine.n != theirs.n:
        return None
    severities = sorted({severity for _, severity in mine.cells.keys() & theirs.cells.keys()})
    rows = []
    for name in (name for name in mine.by_corruption if name in theirs.by_corruption):
        keys = [(name, severity) for severity in severities]
        both = [(mine.cells.get(key), theirs.cells.get(key)) for key in keys]
        cells = [_Cell("–", 0) if one is None or other is None else _difference(one - other) for one, other in both]
        rows.append((_words(name), cells, f"{mine.by_corruption[name] - theirs.by_corruption[name]:+.3f}"))
    return {"n": mine.n, "severities": severities, "rows": rows, "full": _FULL_SHADE}


def _difference(value: float) -> _Cell:
    return _Cell(
        f"{value:+.3f}" if value else "0.000", min(abs(value) / _FULL_SHADE, 1.0), "more" if value >= 0 else "less"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:g}" if isinstance(value, int | float) else str(value)


def _number(value: float | None, unit: str = "", signed: bool = False) -> str:
    """A share with four decimals, a figure that has a unit with four digits; what is no number is said."""
    if value is None:
        return "–"
    return f"{_digits(value, has_unit=bool(unit), signed=signed)} {unit}".rstrip()


def _interval(low: float | None, high: float | None, unit: str = "", signed: bool = False) -> str:
    if low is None or high is None:
        return "–"
    return f"{_digits(low, has_unit=bool(unit), signed=signed)} to {_number(high, unit, signed)}"


def _digits(value: float, *, has_unit: bool, signed: bool) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    sign = "+" if signed and value != 0 else ""
    if has_unit:
        return f"{value:{sign},.4g}"
    return f"{value:{sign}.1e}" if 0 < abs(value) < _SMALL else f"{value:{sign}.4f}"
