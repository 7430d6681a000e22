"""The gate: decides from figures alone which version may serve. Asks nobody and changes nothing.

Measuring is `ml.workflows.judging`'s, carrying the decision out `ml.workflows.promote`'s; the bounds are a
`GatePolicy`'s. The rules:

1. Every candidate must pass the mechanical and the absolute checks. A figure that is missing, impossible or NaN passes
   none.
2. Of those that do, the one with the highest validation accuracy is chosen. The test figures have no part in this
   choice: choosing by them would turn the test set into a second validation set.
3. The chosen one is promoted if it is better than the champion on the same test images by an exact McNemar test, and
   has not been shown to be worse by more than a margin in any class, under corruption or in calibration. A tie, and
   what cannot be told from one, keeps the champion.
4. With no champion, rule 1 alone decides.
5. A champion that could not be measured, or that belongs to another dataset, leaves the candidates waiting: they were
   not judged.
6. Where a promotion is to wait for mirrored requests, what was seen on them may still refuse the winner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ml.evaluation.comparison import Comparison, Difference
from ml.evaluation.gate_policy import GatePolicy
from ml.evaluation.measurement import Measurement
from ml.evaluation.metrics import wilson_interval

Outcome = Literal["promoted", "refused", "pending"]
Group = Literal["mechanical", "absolute", "champion", "shadow"]


@dataclass(frozen=True, slots=True)
class Check:
    """One demand and what was found. `holds` is what decides; the rest is its evidence."""

    name: str
    group: Group
    holds: bool
    says: str
    """A sentence: what was found, and what was expected."""
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval of the figure, where it has one."""
    bound: float | None = None
    unit: str = ""


def at_least(name: str, figure: float, interval: tuple[float, float], bound: float) -> Check:
    """An absolute check, which holds where the whole interval lies at or above the bound."""
    return _bounded(name, figure, interval, bound, f"at least {bound:g} wanted", holds=interval[0] >= bound)


def at_most(name: str, figure: float, interval: tuple[float, float], bound: float) -> Check:
    """An absolute check, which holds where the whole interval lies at or below the bound."""
    return _bounded(name, figure, interval, bound, f"at most {bound:g} wanted", holds=interval[1] <= bound)


def _bounded(
    name: str, figure: float, interval: tuple[float, float], bound: float, wanted: str, *, holds: bool
) -> Check:
    low, high = interval
    sound = all(map(math.isfinite, (figure, low, high)))
    says = f"{figure:.4f} [{low:.4f}, {high:.4f}], {wanted}"
    return Check(name, "absolute", holds and sound, says, figure, low, high, bound)


@dataclass(frozen=True)
class Contender:
    """A candidate and what is known of it.

    `checks` are those that need no champion; where the candidate could not be measured there are none, and `error`
    says why. `comparison` is with the champion that `decide` is given; None where there is none to compare with.
    """

    version: int
    architecture: str
    dataset_id: str
    validation_accuracy: float | None
    checks: tuple[Check, ...] = ()
    comparison: Comparison | None = None
    error: str | None = None


@dataclass(frozen=True)
class Champion:
    """The version that serves; `error` says why it gives nothing to compare with, None where it does."""

    version: int
    architecture: str
    dataset_id: str
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate, and why. `pending` is 'not judged': it is looked at again next time."""

    version: int
    outcome: Outcome
    reason: str
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """What was seen of a candidate on live requests that the champion answered."""

    n: int
    """Images, at least 1."""
    disagreements: int
    """Of those that it answered: how many it takes for another class than the champion."""
    failures: int
    p95_ms: float
    """Of its engine's time for one request; NaN where it answered none."""
    champion_p95_ms: float
    """Likewise, of the same requests."""


@dataclass(frozen=True)
class Decision:
    """The version that is to serve from now on (None: nothing changes), why, and a verdict on every candidate."""

    promoted: int | None
    reason: str
    verdicts: tuple[Verdict, ...]


def decide(
    candidates: Sequence[Contender], champion: Champion | None, policy: GatePolicy, *, new_lineage: bool = False
) -> Decision:
    """Applies the rules above. The same input gives the same answer, in whatever order the candidates come.

    Args:
        candidates: versions that wait for a verdict, all of one dataset.
        champion: the version that serves; None means that it is known that there is none.
        policy: the bounds; those of `checks` were applied when the checks were made.
        new_lineage: lets the candidates succeed a champion of another dataset. The two cannot be compared (its
            training images may be among these test images), so rule 4 applies.

    Raises:
        ValueError: candidates of several datasets, or two with one version number.
    """
    ordered = sorted(candidates, key=lambda item: item.version)
    if len({item.dataset_id for item in ordered}) > 1 or len({item.version for item in ordered}) < len(ordered):
        raise ValueError("The gate compares distinct versions of one dataset.")
    if not ordered:
        return Decision(None, "Nothing to judge: no version waits for a verdict.", ())

    # Of no consequence for the rest: whoever fails by itself is refused, whatever stands against the others.
    flaws = {item.version: _flaw(item) for item in ordered}
    sound = [item for item in ordered if flaws[item.version] is None]
    verdicts = {
        item.version: Verdict(item.version, "refused", f"{_named(item)} cannot be used: {flaw}.", item.checks)
        for item in ordered
        if (flaw := flaws[item.version]) is not None
    }
    if not sound:
        reasons = "; ".join(f"version {number}: {flaw}" for number, flaw in flaws.items())
        return _decision(None, f"No candidate can be used: {reasons}.", verdicts)

    obstacle = _obstacle(sound[0], champion, new_lineage=new_lineage)
    if obstacle is not None:
        waiting = {item.version: Verdict(item.version, "pending", obstacle, item.checks) for item in sound}
        return _decision(None, obstacle, verdicts | waiting)

    chosen = max(sound, key=lambda item: (item.validation_accuracy or 0.0, item.version))
    rival = champion if champion is not None and champion.dataset_id == chosen.dataset_id else None
    judged = _without_rival(chosen, champion) if rival is None else _against(chosen, rival, policy)
    passed_over = {
        item.version: Verdict(
            item.version,
            "refused",
            f"version {chosen.version} was chosen over it by validation accuracy: "
            f"{chosen.validation_accuracy:.4f} against {item.validation_accuracy:.4f}.",
            item.checks,
        )
        for item in sound
        if item is not chosen
    }
    promoted = chosen.version if judged.outcome == "promoted" else None
    return _decision(promoted, judged.reason, verdicts | passed_over | {chosen.version: judged})


def absolute_checks(measured: Measurement, policy: GatePolicy) -> tuple[Check, ...]:
    """What is demanded of every candidate's figures, whoever serves."""
    bounds, found, corrupted = policy.absolute, measured.metrics, measured.robustness
    calibration = (measured.calibration_low, measured.calibration_high)
    name = "accuracy under corruption"
    return (
        at_least("accuracy", found.accuracy, (found.accuracy_low, found.accuracy_high), bounds.accuracy),
        at_most("calibration error", found.calibration_error, calibration, bounds.calibration_error),
        Check(name, "absolute", holds=False, says="was not measured", bound=bounds.corrupted_accuracy)
        if corrupted is None
        else at_least(
            name,
            corrupted.mean_accuracy,
            (corrupted.mean_accuracy_low, corrupted.mean_accuracy_high),
            bounds.corrupted_accuracy,
        ),
    )


def champion_checks(comparison: Comparison, policy: GatePolicy) -> tuple[Check, ...]:
    """What is demanded of a candidate that has a champion to beat."""
    demands = policy.champion
    better = comparison.accuracy
    pairs = comparison.pairs
    checks = [
        Check(
            name="better than the champion",
            group="champion",
            holds=better.value > 0 and comparison.p_value <= demands.level,
            says=f"accuracy {better.value:+.4f} [{better.low:+.4f}, {better.high:+.4f}] on the same {pairs.n} images: "
            f"{pairs.gained} gained, {pairs.lost} lost, exact McNemar p = {comparison.p_value:.2g}, at most "
            f"{demands.level:g} wanted; a true difference of {comparison.smallest_seen:.4f} would be seen "
            f"{demands.power:.0%} of the time",
            figure=better.value,
            low=better.low,
            high=better.high,
            bound=0.0,
        )
    ]
    for each in comparison.classes:
        checks.append(
            Check(
                name=f"{each.label}: recall",
                group="champion",
                holds=each.fallen_p > demands.level,
                says=f"{each.recall.value:+.4f} [{each.recall.low:+.4f}, {each.recall.high:+.4f}] on {each.pairs.n} "
                f"images; p = {each.fallen_p:.2g} that it fell by no more than {demands.class_margin:g}, above "
                f"{demands.level:g} wanted",
                figure=each.recall.value,
                low=each.recall.low,
                high=each.recall.high,
                bound=-demands.class_margin,
            )
        )
    for name, found, margin, sign in (
        ("accuracy under corruption", comparison.corrupted_accuracy, demands.corrupted_margin, 1),
        ("calibration error", comparison.calibration_error, demands.calibration_margin, -1),
    ):
        if found is not None:
            checks.append(_not_shown_worse(name, found, margin, sign))
    return tuple(checks)


def shadow_checks(seen: ShadowSummary, comparison: Comparison | None, policy: GatePolicy) -> tuple[Check, ...]:
    """What is demanded of a candidate on mirrored requests.

    Args:
        seen: what happened on them.
        comparison: with that champion on the test images; None where the two were not compared (a new lineage): then
            there is no share of disagreement to be expected, and it is told without being bounded.
        policy: the bounds.
    """
    bounds = policy.shadow
    failed = seen.failures / seen.n
    return (
        Check(
            "answers to mirrored requests",
            "shadow",
            holds=failed <= bounds.failures,
            says=f"{seen.failures} of {seen.n} images failed, a share of at most {bounds.failures:g} wanted",
            figure=failed,
            bound=bounds.failures,
        ),
        _disagreement(seen, comparison, bounds.disagreement_margin),
        Check(
            "p95 latency on mirrored requests",
            "shadow",
            holds=seen.p95_ms <= bounds.p95_latency_ms,  # NaN does not
            says=f"{seen.p95_ms:.1f} ms (the champion {seen.champion_p95_ms:.1f} ms on the same requests), at most "
            f"{bounds.p95_latency_ms:g} ms wanted",
            figure=seen.p95_ms,
            bound=bounds.p95_latency_ms,
            unit="ms",
        ),
    )


def _disagreement(seen: ShadowSummary, comparison: Comparison | None, margin: float) -> Check:
    name, answered = "disagreement on mirrored requests", seen.n - seen.failures
    if answered == 0:
        return Check(name, "shadow", holds=False, says="no image was answered")
    share, (low, high) = seen.disagreements / answered, wilson_interval(seen.disagreements, answered)
    found = f"{share:.4f} [{low:.4f}, {high:.4f}] of {answered} images"
    if comparison is None:
        says = f"{found}; not bounded, since the two were not compared on test images"
        return Check(name, "shadow", holds=True, says=says, figure=share, low=low, high=high)
    bound = comparison.differing + margin
    return Check(
        name,
        "shadow",
        holds=low <= bound,
        says=f"{found}; not shown to exceed {bound:.4f} wanted: {comparison.differing:.4f} on the test images and "
        f"{margin:g}",
        figure=share,
        low=low,
        high=high,
        bound=bound,
    )


def after_shadow(decision: Decision, checks: Sequence[Check]) -> Decision:
    """The decision once its winner has been seen on mirrored requests: promoted, or refused by one of `checks`."""
    failed = _failures(checks)
    verdict = next(item for item in decision.verdicts if item.version == decision.promoted)
    if failed is None:
        reason = f"{verdict.reason} On mirrored requests: {'; '.join(f'{c.name}: {c.says}' for c in checks)}."
        return _replaced(decision, replace(verdict, reason=reason, checks=verdict.checks + tuple(checks)))
    reason = f"version {verdict.version} passed on the test images and failed on mirrored requests: {failed}."
    refused = Verdict(verdict.version, "refused", reason, verdict.checks + tuple(checks))
    return _replaced(decision, refused)


def postponed(decision: Decision, why: str) -> Decision:
    """The decision while its winner has not been seen on enough mirrored requests: it waits."""
    verdict = next(item for item in decision.verdicts if item.version == decision.promoted)
    return _replaced(decision, replace(verdict, outcome="pending", reason=f"{why} {verdict.reason}"))


def _replaced(decision: Decision, verdict: Verdict) -> Decision:
    """The winner's verdict is another one."""
    others = {item.version: item for item in decision.verdicts}
    promoted = verdict.version if verdict.outcome == "promoted" else None
    return _decision(promoted, verdict.reason, others | {verdict.version: verdict})


def _not_shown_worse(name: str, found: Difference, margin: float, sign: int) -> Check:
    """Fails where the whole interval lies beyond the margin on the bad side: `sign` is 1 where more is better."""
    worst, best = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    wanted = f"not shown to have {'fallen' if sign > 0 else 'risen'} by more than {margin:g}"
    return Check(
        name=f"change of {name}",
        group="champion",
        holds=math.isfinite(worst) and best >= -margin,
        says=f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {wanted}",
        figure=found.value,
        low=found.low,
        high=found.high,
        bound=-margin * sign,
    )


def _flaw(item: Contender) -> str | None:
    """Why this candidate is refused whoever serves; None where it is not."""
    if item.error is not None:
        return f"it could not be measured ({item.error})"
    value = item.validation_accuracy
    if value is None:
        return "no validation accuracy was kept with it"
    if not (math.isfinite(value) and 0 <= value <= 1):
        return f"its validation accuracy is {value}"
    if not item.checks:
        return "it was not measured"
    return _failures(item.checks)


def _failures(checks: Sequence[Check]) -> str | None:
    failed = [f"{check.name}: {check.says}" for check in checks if not check.holds]
    return "; ".join(failed) or None


def _obstacle(candidate: Contender, champion: Champion | None, *, new_lineage: bool) -> str | None:
    """Why candidates that are sound cannot be judged now; None where they can."""
    if champion is None:
        return None
    if champion.dataset_id != candidate.dataset_id:
        if new_lineage:
            return None
        return (
            f"The champion, version {champion.version}, belongs to dataset {champion.dataset_id or 'unknown'}, the "
            f"candidates to {candidate.dataset_id}: they cannot be compared. Promote with --new-lineage to let a model "
            "of the new dataset succeed it."
        )
    if champion.error is not None:
        return (
            f"The champion, version {champion.version}, gives nothing to compare with: {champion.error}. The "
            "candidates wait; `cifar10 rollback` restores the previous champion."
        )
    return None


def _against(chosen: Contender, champion: Champion, policy: GatePolicy) -> Verdict:
    who, other = _named(chosen), f"champion {_named(champion)}"
    if chosen.comparison is None or chosen.comparison.champion != champion.version:
        return Verdict(chosen.version, "refused", f"{who} was not compared with {other}.", chosen.checks)
    checks = champion_checks(chosen.comparison, policy)
    failed = _failures(checks)
    figures = checks[0].says
    if failed is None:
        return Verdict(chosen.version, "promoted", f"{who} is better than {other}: {figures}.", chosen.checks + checks)
    reason = f"{who} does not succeed {other}: {failed}."
    if chosen.comparison.accuracy.value == 0:
        reason = f"{who} only equals {other}, and a tie keeps the champion: {figures}."
    return Verdict(chosen.version, "refused", reason, chosen.checks + checks)


def _without_rival(chosen: Contender, champion: Champion | None) -> Verdict:
    why = (
        "there is no champion to beat"
        if champion is None
        else f"a new lineage: the champion, version {champion.version} of dataset {champion.dataset_id or 'unknown'}, "
        f"is not compared with models of {chosen.dataset_id}"
    )
    figures = "; ".join(f"{check.name}: {check.says}" for check in chosen.checks if check.group == "absolute")
    return Verdict(
        chosen.version, "promoted", f"{_named(chosen)} passes every check, and {why}. {figures}.", chosen.checks
    )


def _named(item: Contender | Champion) -> str:
    return f"version {item.version} ({item.architecture})"


def _decision(promoted: int | None, reason: str, verdicts: dict[int, Verdict]) -> Decision:
    return Decision(promoted, reason, tuple(verdicts[number] for number in sorted(verdicts)))
