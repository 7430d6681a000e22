"""Live accuracy and its interval, against scipy."""

import numpy as np
import pytest
from scipy import stats

from ml.monitoring.performance import live_performance, wilson_interval
from ml.monitoring.prediction_log import NO_LABEL


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 10), (480, 1000)])
def test_wilson_is_scipys(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_proportion_is_refused(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, n)


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
