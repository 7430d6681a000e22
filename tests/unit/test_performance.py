"""Live accuracy and its interval, against scipy."""

import numpy as np
import pytest

from ml.evaluation.metrics import wilson_interval
from ml.monitoring.performance import live_performance
from ml.monitoring.prediction_log import NO_LABEL


def test_only_labelled_predictions_are_measured():
    probabilities = np.full((4, 10), 0.1, np.float32)
    probabilities[:, 3] = 0.5
    found = live_performance(np.array([3, 3, 3, 3]), probabilities, np.array([3, NO_LABEL, 5, 3]))
    assert (found.labelled, found.correct) == (3, 2)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.interval == wilson_interval(2, 3)
    assert found.estimated_accuracy == pytest.approx(0.5)


def test_what_is_not_known_is_none():
    nothing = live_performance(np.zeros(0, int), np.zeros((0, 10), np.float32), np.zeros(0, int))
    assert (nothing.labelled, nothing.accuracy, nothing.interval, nothing.estimated_accuracy) == (0, None, None, None)
    broken = live_performance(np.array([1]), np.full((1, 10), np.nan, np.float32), np.array([NO_LABEL]))
    assert broken.estimated_accuracy is None
