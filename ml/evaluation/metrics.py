"""How good a set of predictions is, as a pure function of labels and probabilities. Plots and decisions are others'."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.stats import binomtest

from ml.datasets.labels import CLASS_NAMES, NUM_CLASSES
from ml.errors import InputInvalid

CALIBRATION_BINS = 15
_FLOOR = 1e-7  # as Keras clips (keras.config.epsilon), so that one confident miss does not make the mean infinite


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class against the rest. A ratio whose denominator is nought is 0, as in scikit-learn's zero_division=0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """What `evaluate` found. All ratios lie in 0..1; macro means are over the ten classes, unweighted."""

    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95 % interval."""
    loss: float
    """Mean categorical cross-entropy, in nats."""
    precision: float
    recall: float
    f1: float
    calibration_error: float
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    """confusion[i][j]: how many of true class i were taken for class j."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """The figures that are one number each, by name."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int | float)}


def evaluate(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Measures predictions; the predicted class is the most probable one, the first of equals.

    Args:
        labels: int (n,), 0..9, n >= 1.
        probabilities: float (n, 10), each row >= 0 and of sum 1 (to 1e-3).

    Raises:
        InputInvalid: empty, of the wrong shape, out of range, or not finite.
    """
    labels, probabilities = _checked(labels, probabilities)
    n = len(labels)
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = np.diag(confusion)
    precision = _ratio(hits, confusion.sum(axis=0))
    recall = _ratio(hits, confusion.sum(axis=1))
    f1 = _ratio(2 * hits, confusion.sum(axis=0) + confusion.sum(axis=1))
    correct = int(hits.sum())
    low, high = wilson_interval(correct, n)
    true_class = np.clip(probabilities[np.arange(n), labels], _FLOOR, 1)
    return Metrics(
        n=n,
        accuracy=correct / n,
        accuracy_low=low,
        accuracy_high=high,
        loss=float(-np.log(true_class).mean()),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        calibration_error=calibration_error(labels, probabilities),
        classes=tuple(
            ClassMetrics(name, float(precision[i]), float(recall[i]), float(f1[i]), int(confusion[i].sum()))
            for i, name in enumerate(CLASS_NAMES)
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion that keeps within 0..1 and holds its level at small n (Wilson 1927).

    Raises:
        InputInvalid: n < 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputInvalid(f"{successes} successes in {n} trials.", fix="give 0 <= successes <= n and n >= 1.")
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017): how far confidence lies from accuracy, in 0..1.

    Confidence, the largest probability, is cut into `bins` intervals of equal width over 0..1, open below and closed
    above; the error is the mean over images of |mean confidence - accuracy| of the image's interval.

    Raises:
        InputInvalid: as `evaluate`.
    """
    gaps = CalibrationGaps.of(labels, probabilities, bins)
    return gaps.error(np.ones(len(gaps.bins)))


@dataclass(frozen=True, slots=True)
class CalibrationGaps:
    """What each image adds to the calibration error, so that a resample of the images costs one sum."""

    bins: np.ndarray
    """int (n,): the interval of confidence that the image lies in."""
    gaps: np.ndarray
    """float (n,): confidence less 1 where the prediction is right, less 0 where it is wrong."""

    @classmethod
    def of(cls, labels: np.ndarray, probabilities: np.ndarray, bins: int = CALIBRATION_BINS) -> Self:
        """As `calibration_error` takes them.

        Raises:
            InputInvalid: as `evaluate`.
        """
        labels, probabilities = _checked(labels, probabilities)
        confidence = probabilities.max(axis=1)
        correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
        return cls(np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1), confidence - correct)

    def error(self, counts: np.ndarray) -> float:
        """The calibration error of a sample that holds each image so often: number (n,), of positive sum."""
        # |sum of confidences - hits| of a bin is its size times |mean confidence - accuracy|.
        return float(np.abs(np.bincount(self.bins, weights=self.gaps * counts)).sum() / counts.sum())


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The images whose confidence lies in one interval, above `low` and at most `high`."""

    low: float
    high: float
    n: int
    confidence: float
    """Mean."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95 % interval."""


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[ReliabilityBin, ...]:
    """How often predictions of each confidence are right, in the intervals of `calibration_error` that hold an image.

    Raises:
        InputInvalid: as `evaluate`.
    """
    found = CalibrationGaps.of(labels, probabilities, bins)
    confidence = np.asarray(probabilities, dtype=np.float64).max(axis=1)
    counts = np.bincount(found.bins, minlength=bins)
    confidences = np.bincount(found.bins, weights=confidence, minlength=bins)
    hits = np.rint(np.bincount(found.bins, weights=confidence - found.gaps, minlength=bins)).astype(np.int64)
    return tuple(
        ReliabilityBin(
            i / bins,
            (i + 1) / bins,
            int(counts[i]),
            float(confidences[i] / counts[i]),
            float(hits[i] / counts[i]),
            *wilson_interval(int(hits[i]), int(counts[i])),
        )
        for i in np.flatnonzero(counts)
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two as arrays of one kind, float64 for the sums."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    wrong = _what_is_wrong(labels, probabilities)
    if wrong:
        raise InputInvalid(
            f"Predictions cannot be measured: {wrong}.",
            fix=f"give integer labels (n,) of 0..{NUM_CLASSES - 1} and probabilities (n, {NUM_CLASSES}), n >= 1.",
        )
    return labels.astype(np.int64), probabilities


def _what_is_wrong(labels: np.ndarray, probabilities: np.ndarray) -> str | None:
    if labels.ndim != 1 or probabilities.shape != (len(labels), NUM_CLASSES):
        return f"labels have shape {labels.shape}, probabilities {probabilities.shape}"
    if len(labels) == 0:
        return "there are none"
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= NUM_CLASSES:
        return f"labels are {labels.dtype} from {labels.min()} to {labels.max()}"
    if not np.isfinite(probabilities).all():
        return f"{int((~np.isfinite(probabilities)).any(axis=1).sum())} rows hold NaN or infinity"
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        return "rows are negative somewhere or do not add up to 1"
    return None
