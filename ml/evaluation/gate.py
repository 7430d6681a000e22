"""The gate: decides from figures alone which version may serve. Asks nobody and changes nothing.

Measuring is `ml.workflows.promote`'s, and so is carrying the decision out. The rules:

1. Among the candidates whose figures are whole, the one with the highest validation accuracy is chosen. The test
   figures have no part in this choice: choosing by them would turn the test set into a second validation set.
2. The chosen one is promoted if its accuracy on the test images is strictly higher than the champion's on the same
   images. A tie keeps the champion.
3. With no champion, it is promoted if the lower end of its accuracy's 95 % interval lies above chance.
4. A missing, impossible or NaN figure promotes nothing. A champion that could not be measured, or that belongs to
   another dataset, leaves the candidates waiting: they were not judged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ml.evaluation.metrics import wilson_interval

CHANCE = 0.1
"""Accuracy of guessing one class of ten."""

Outcome = Literal["promoted", "refused", "pending"]


@dataclass(frozen=True)
class Measurement:
    """Figures of one model on the test images. Accuracy, precision and recall (macro means) in 0-1; loss in nats."""

    n: int
    accuracy: float
    precision: float
    recall: float
    loss: float

    def problem(self) -> str | None:
        """What is wrong with these figures, in words; None where they can be used."""
        if self.n <= 0:
            return f"it was measured on {self.n} images"
        for name in ("accuracy", "precision", "recall"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                return f"its {name} is {value}"
        if not (math.isfinite(self.loss) and self.loss >= 0):
            return f"its loss is {self.loss}"
        return None


@dataclass(frozen=True)
class Contender:
    """A version and what is known of it. `test` is None, and `error` says why, where it could not be measured."""

    version: int
    architecture: str
    dataset_id: str
    validation_accuracy: float | None
    test: Measurement | None
    error: str | None = None

    def problem(self) -> str | None:
        """Why its test figures cannot be used, in words; None where they can."""
        if self.error is not None:
            return f"it could not be measured ({self.error})"
        if self.test is None:
            return "it was not measured"
        return self.test.problem()


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate, and why. `pending` is 'not judged': it is looked at again next time."""

    version: int
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Decision:
    """The version that is to serve from now on (None: nothing changes), why, and a verdict on every candidate."""

    promoted: int | None
    reason: str
    verdicts: tuple[Verdict, ...]


def decide(candidates: Sequence[Contender], champion: Contender | None, *, new_lineage: bool = False) -> Decision:
    """Applies the rules above. The same input gives the same answer, in whatever order the candidates come.

    Args:
        candidates: versions that wait for a verdict, all of one dataset.
        champion: the version that serves; None means that it is known that there is none.
        new_lineage: lets the candidates succeed a champion of another dataset. The two cannot be compared (its
            training images may be among these test images), so rule 3 applies.

    Raises:
        ValueError: candidates of several datasets, or two with one version number.
    """
    ordered = sorted(candidates, key=lambda item: item.version)
    if len({item.dataset_id for item in ordered}) > 1 or len({item.version for item in ordered}) < len(ordered):
        raise ValueError("The gate compares distinct versions of one dataset.")
    if not ordered:
        return Decision(None, "Nothing to judge: no version waits for a verdict.", ())

    # Of no consequence for the rest: whoever is broken is refused, whatever stands against the others.
    broken = {item.version: _flaw(item) for item in ordered}
    whole = [item for item in ordered if broken[item.version] is None]
    if not whole:
        reasons = "; ".join(f"version {number}: {flaw}" for number, flaw in broken.items())
        return Decision(None, f"No candidate can be used: {reasons}.", _verdicts(ordered, broken, {}))

    obstacle = _obstacle(whole[0], champion, new_lineage=new_lineage)
    if obstacle is not None:
        waiting = {item.version: Verdict(item.version, "pending", obstacle) for item in whole}
        return Decision(None, obstacle, _verdicts(ordered, broken, waiting))

    chosen = max(whole, key=lambda item: (item.validation_accuracy or 0.0, item.version))
    wins, reason = _judge(chosen, champion)
    passed_over = {
        item.version: Verdict(
            item.version,
            "refused",
            f"version {chosen.version} was chosen over it by validation accuracy: "
            f"{chosen.validation_accuracy:.4f} against {item.validation_accuracy:.4f}.",
        )
        for item in whole
        if item is not chosen
    }
    judged = {chosen.version: Verdict(chosen.version, "promoted" if wins else "refused", reason)}
    return Decision(chosen.version if wins else None, reason, _verdicts(ordered, broken, passed_over | judged))


def _flaw(item: Contender) -> str | None:
    value = item.validation_accuracy
    if value is None:
        return "no validation accuracy was kept with it"
    if not (math.isfinite(value) and 0 <= value <= 1):
        return f"its validation accuracy is {value}"
    return item.problem()


def _obstacle(candidate: Contender, champion: Contender | None, *, new_lineage: bool) -> str | None:
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
    problem = champion.problem()
    if problem is not None:
        return (
            f"The champion, version {champion.version}, gives nothing to compare with: {problem}. The candidates wait; "
            "`cifar10 rollback` restores the previous champion."
        )
    return None


def _judge(chosen: Contender, champion: Contender | None) -> tuple[bool, str]:
    assert chosen.test is not None  # noqa: S101 - whole candidates only
    mine = chosen.test
    who = f"version {chosen.version} ({chosen.architecture})"
    if champion is None or champion.test is None or champion.dataset_id != chosen.dataset_id:
        lower, _ = wilson_interval(round(mine.accuracy * mine.n), mine.n)
        figures = f"test accuracy {mine.accuracy:.4f} on {mine.n} images, 95 % lower bound {lower:.4f}"
        if lower > CHANCE:
            return True, f"{_without_rival(chosen, champion)} {who} is above chance ({CHANCE:.2f}): {figures}."
        return False, f"{_without_rival(chosen, champion)} {who} is not clearly above chance ({CHANCE:.2f}): {figures}."
    theirs = champion.test
    other = f"champion version {champion.version} ({champion.architecture})"
    if theirs.n != mine.n:
        return False, f"{who} and {other} were measured on different images: {mine.n} against {theirs.n}."
    figures = f"test accuracy {mine.accuracy:.4f} against {theirs.accuracy:.4f} on the same {mine.n} images"
    if mine.accuracy > theirs.accuracy:
        return True, f"{who} is better than {other}: {figures}."
    if mine.accuracy == theirs.accuracy:
        return False, f"{who} only equals {other}, and a tie keeps the champion: {figures}."
    return False, f"{who} is not better than {other}: {figures}."


def _without_rival(chosen: Contender, champion: Contender | None) -> str:
    if champion is None:
        return "No champion to beat;"
    return (
        f"A new lineage: the champion, version {champion.version} of dataset {champion.dataset_id or 'unknown'}, is "
        f"not compared with models of {chosen.dataset_id};"
    )


def _verdicts(
    ordered: Sequence[Contender], broken: dict[int, str | None], judged: dict[int, Verdict]
) -> tuple[Verdict, ...]:
    return tuple(
        judged.get(item.version) or Verdict(item.version, "refused", f"refused: {broken[item.version]}.")
        for item in ordered
    )
