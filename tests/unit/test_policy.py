"""What follows from a window: the table of cases."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from ml.monitoring.policy import PastRetraining, alert_due, lost_retrainings, retraining_decision, verdict
from ml.monitoring.reference import STATISTIC_NAMES, Sample
from ml.monitoring.statistics import test_drift

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def past(hours_ago, *, started=True, finished=True, id=1):
    """Asked for, started at once unless it was not, and finished now unless it is not."""
    asked = NOW - hours_ago * HOUR
    return PastRetraining(id, asked, asked if started else None, NOW if finished else None)


def drift_result(shift):
    generator = np.random.default_rng(0)

    def sample(n, shift):
        probabilities = generator.dirichlet(np.ones(10), n).astype(np.float32)
        statistics = {name: generator.normal(shift, 1, n).astype(np.float32) for name in STATISTIC_NAMES}
        return Sample(probabilities.argmax(axis=1), probabilities, statistics)

    return test_drift(sample(1000, 0), sample(500, shift), 0.01)


def test_too_few_predictions_are_insufficient_even_where_they_look_drifted():
    drifted, same = drift_result(2.0), drift_result(0.0)
    assert verdict(99, 100, drifted) == "insufficient"
    assert verdict(99, 100, None) == "insufficient"
    assert verdict(100, 100, drifted) == "drift"
    assert verdict(100, 100, same) == "stable"
    with pytest.raises(ValueError, match="no drift test"):
        verdict(100, 100, None)


def test_only_drift_alerts():
    assert [alert_due(word) for word in ("drift", "stable", "insufficient")] == [True, False, False]


@pytest.mark.parametrize(
    ("word", "history", "due", "reason"),
    [
        ("drift", [], True, "no retraining was asked for before"),
        ("stable", [], False, "stable, not drift"),
        ("insufficient", [], False, "insufficient, not drift"),
        ("drift", [past(1, finished=False)], False, "one is running since 2026-05-01 11:00:00+00:00"),
        ("drift", [past(9, finished=False), past(1)], False, "one is running since 2026-05-01 03:00:00+00:00"),
        ("drift", [past(5.5)], False, "cool-down until 2026-05-01 12:30:00+00:00"),
        ("drift", [past(20), past(5.5), past(30)], False, "cool-down until 2026-05-01 12:30:00+00:00"),
        ("drift", [past(6)], True, "asked for at 2026-05-01 06:00:00+00:00"),
    ],
)
def test_retraining_cases(word, history, due, reason):
    decision = retraining_decision(word, history, NOW, 6 * HOUR)
    assert decision.due is due
    assert reason in decision.reason


@pytest.mark.parametrize("word", ["drift", "stable", "insufficient"])
def test_one_that_nobody_started_is_handed_on_whatever_the_window_says(word):
    waiting = past(1, started=False, finished=False, id=4)
    decision = retraining_decision(word, [past(9), waiting], NOW, 6 * HOUR)
    assert (decision.due, decision.asked_before) == (True, 4)
    assert "retraining 4 was asked for at 2026-05-01 11:00:00+00:00 and has not started yet" in decision.reason
    never_started = past(9, started=False)  # closed before anybody started it
    assert retraining_decision("drift", [never_started], NOW, 6 * HOUR).asked_before is None


def test_no_cooldown_still_trains_one_at_a_time():
    assert retraining_decision("drift", [past(0)], NOW, timedelta(0)).due
    assert not retraining_decision("drift", [past(0, finished=False)], NOW, timedelta(0)).due


def test_an_open_retraining_is_lost_48_hours_after_it_began():
    history = [
        past(47.99, finished=False, id=1),
        past(48, finished=False, id=2),
        past(48, finished=True, id=3),
        past(48, started=False, finished=False, id=4),
        PastRetraining(5, NOW - 70 * HOUR, NOW - 40 * HOUR, None),
    ]
    assert lost_retrainings(history, NOW) == (2, 4)
