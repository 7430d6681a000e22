"""A candidate against the champion on the same images: all that the gate and its report need to know of the two.

Figures alone; which of them refuse a candidate is `ml.evaluation.gate`'s. The tests are `significance`'s.
"""

from dataclasses import dataclass

import numpy as np

from ml.datasets.labels import CLASS_NAMES
from ml.errors import InputInvalid
from ml.evaluation.metrics import CalibrationGaps
from ml.evaluation.significance import (
    Paired,
    difference_interval,
    fallen_by_more_than,
    holm,
    mcnemar,
    percentiles,
    smallest_seen,
    student_interval,
)

_SEED = 20
_CALIBRATION_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Difference:
    """The candidate's figure less the champion's, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ClassComparison:
    """The images of one class: the difference in recall."""

    label: str
    pairs: Paired
    recall: Difference
    fallen_p: float
    """Of "recall fell by no more than the margin", after Holm over the ten classes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found."""

    champion: int
    """The version compared with."""
    pairs: Paired
    accuracy: Difference
    p_value: float
    """Exact McNemar, two-sided."""
    smallest_seen: float
    """The smallest true difference that this test finds at this n and disagreement, with the power asked for."""
    differing: float
    """Share of the images that the two take for different classes, rightly or wrongly."""
    classes: tuple[ClassComparison, ...]
    calibration_error: Difference
    corrupted_accuracy: Difference | None
    """None where it was not measured."""


def compare(
    labels: np.ndarray,
    candidate: np.ndarray,
    champion: np.ndarray,
    *,
    version: int,
    level: float,
    power: float,
    class_margin: float,
    corrupted: tuple[np.ndarray, np.ndarray] | None = None,
) -> Comparison:
    """Compares two models on the same images.

    Args:
        labels: int (n,), the true classes, 0..9.
        candidate: float (n, 10), its probabilities for these images, in this order.
        champion: likewise.
        version: the champion's.
        level: of the McNemar test, for `smallest_seen`.
        power: likewise.
        class_margin: by how much a class's recall may fall; see `fallen_by_more_than`.
        corrupted: for both, the share of the corrupted copies of each image that it has right, float (m,) each.

    Raises:
        InputInvalid: no image, or shapes that are no pairs.
    """
    if not (labels.ndim == 1 and len(labels) and candidate.shape == champion.shape == (len(labels), len(CLASS_NAMES))):
        raise InputInvalid(
            f"Labels {labels.shape}, candidate {candidate.shape} and champion {champion.shape} are no pairs.",
            fix="give one label and two rows of ten probabilities for each of one or more images.",
        )
    mine, theirs = candidate.argmax(axis=1) == labels, champion.argmax(axis=1) == labels
    pairs = paired(mine, theirs)
    of_classes = [
        (name, paired(mine[here], theirs[here]))
        for name, here in ((name, labels == i) for i, name in enumerate(CLASS_NAMES))
        if here.any()
    ]
    fallen = holm(np.array([fallen_by_more_than(class_margin, each) for _, each in of_classes]))
    return Comparison(
        champion=version,
        pairs=pairs,
        accuracy=Difference(pairs.difference, *difference_interval(pairs)),
        p_value=mcnemar(pairs),
        smallest_seen=smallest_seen(pairs.n, pairs.disagreement, level, power),
        differing=float((candidate.argmax(axis=1) != champion.argmax(axis=1)).mean()),
        classes=tuple(
            ClassComparison(name, each, Difference(each.difference, *difference_interval(each)), float(p))
            for (name, each), p in zip(of_classes, fallen, strict=True)
        ),
        calibration_error=calibration_difference(labels, candidate, champion),
        corrupted_accuracy=None if corrupted is None else _mean_difference(*corrupted),
    )


def paired(mine: np.ndarray, theirs: np.ndarray) -> Paired:
    """Counts of the images that one alone has right; bool (n,) each, n >= 1: whether the image is right."""
    return Paired(len(mine), int((mine & ~theirs).sum()), int((theirs & ~mine).sum()))


def calibration_difference(labels: np.ndarray, candidate: np.ndarray, champion: np.ndarray) -> Difference:
    """The candidate's calibration error less the champion's.

    With a paired percentile bootstrap over the images: both models see each resample.

    Args:
        labels: int (n,), the true classes, 0..9.
        candidate: float (n, 10), its probabilities for these images, in this order.
        champion: likewise.

    Raises:
        InputInvalid: as `ml.evaluation.metrics.evaluate`.
    """
    mine, theirs = CalibrationGaps.of(labels, candidate), CalibrationGaps.of(labels, champion)
    rng, n = np.random.default_rng(_SEED), len(labels)
    drawn = []
    for _ in range(_CALIBRATION_RESAMPLES):
        counts = np.bincount(rng.integers(0, n, n), minlength=n)
        drawn.append(mine.error(counts) - theirs.error(counts))
    whole = np.ones(n)
    return Difference(mine.error(whole) - theirs.error(whole), *percentiles(np.array(drawn)))


def _mean_difference(mine: np.ndarray, theirs: np.ndarray) -> Difference:
    if mine.shape != theirs.shape or mine.ndim != 1:
        raise InputInvalid(
            f"Shares of right answers under corruption of {mine.shape} and {theirs.shape} images are no pairs.",
            fix="measure both models on the same corrupted images.",
        )
    differences = mine - theirs
    return Difference(float(differences.mean()), *student_interval(differences))
