"""How good the served model is now: measured where people have said what the images show, estimated elsewhere.

Pure functions of arrays. Whether the inputs have moved is `ml.monitoring.statistics`'.
"""

import math
from dataclasses import dataclass

import numpy as np

from ml.evaluation.metrics import wilson_interval
from ml.monitoring.prediction_log import NO_LABEL


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
