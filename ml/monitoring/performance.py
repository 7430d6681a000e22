"""How good the served model is now: measured where people have said what the images show, estimated elsewhere.

Pure functions of arrays. Whether the inputs have moved is `ml.monitoring.statistics`'.
"""

import math
from dataclasses import dataclass

import numpy as np

from ml.monitoring.prediction_log import NO_LABEL

Z_95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile: a two-sided 95 % interval."""


@dataclass(frozen=True)
class LivePerformance:
    """One window's accuracy.

    Attributes:
        labelled: how many predictions have feedback.
        correct: how many of those are right.
        accuracy: correct / labelled, None where nothing is labelled.
        interval: Wilson's 95 % interval of it, None where nothing is labelled.
        estimated_accuracy: mean top-class probability over all predictions. It equals the accuracy only for a
            calibrated model; networks are mostly over-confident, and more so on drifted images. None for no
            predictions, and where some probability is not finite.
    """

    labelled: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None
    estimated_accuracy: float | None


def live_performance(class_ids: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> LivePerformance:
    """Measures and estimates the accuracy of a window.

    Args:
        class_ids: integers (n,), the predicted classes.
        probabilities: floats (n, 10).
        labels: integers (n,), the true classes, NO_LABEL where nobody has said.
    """
    known = labels != NO_LABEL
    labelled = int(known.sum())
    correct = int((class_ids[known] == labels[known]).sum())
    estimate = float(probabilities.max(axis=1).mean(dtype=np.float64)) if len(probabilities) else math.nan
    return LivePerformance(
        labelled=labelled,
        correct=correct,
        accuracy=correct / labelled if labelled else None,
        interval=wilson_interval(correct, labelled) if labelled else None,
        estimated_accuracy=estimate if math.isfinite(estimate) else None,
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, within 0..1 and sound for small n and for shares of 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Raises:
        ValueError: unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
