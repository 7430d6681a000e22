"""One model on the test images: everything that the gate bounds or compares, measured once."""

from dataclasses import dataclass, field

import numpy as np

from ml.evaluation.metrics import CalibrationGaps, Metrics, evaluate
from ml.evaluation.robustness import Robustness
from ml.evaluation.significance import percentiles

_SEED = 20
_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """What `measure` found."""

    labels: np.ndarray = field(repr=False, compare=False)
    """int (n,), 0..9."""
    probabilities: np.ndarray = field(repr=False, compare=False)
    """float (n, 10)."""
    metrics: Metrics
    calibration_low: float
    calibration_high: float
    """95 % bootstrap interval of `metrics.calibration_error`."""
    robustness: Robustness | None
    """None where it was not measured."""


def measure(labels: np.ndarray, probabilities: np.ndarray, robustness: Robustness | None) -> Measurement:
    """Figures and intervals of predictions for the clean test images.

    Args:
        labels: int (n,), 0..9, n >= 1.
        probabilities: float (n, 10), for these images in this order.
        robustness: of the same model.

    Raises:
        InputInvalid: as `ml.evaluation.metrics.evaluate`.
    """
    metrics = evaluate(labels, probabilities)
    low, high = calibration_interval(labels, probabilities)
    return Measurement(labels, probabilities, metrics, low, high, robustness)


def calibration_interval(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the expected calibration error, resampling images.

    The error is a sum of absolute values: resamples of a well-calibrated model lie above the figure itself, so the
    interval errs upwards, which is the strict side for a bound from above.

    Raises:
        InputInvalid: as `ml.evaluation.metrics.evaluate`.
    """
    gaps = CalibrationGaps.of(labels, probabilities)
    rng, n = np.random.default_rng(_SEED), len(labels)
    drawn = [gaps.error(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(_RESAMPLES)]
    return percentiles(np.array(drawn))
