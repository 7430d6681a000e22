"""What follows from a window: its verdict, whether people are alerted, whether a model is retrained.

Pure: takes what is known, returns a decision with its reason in words. Writing it down is `ml.monitoring.windows`',
telling people is `ml.monitoring.alerts`', starting the training is the orchestrator's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from ml.monitoring.statistics import DriftResult

Verdict = Literal["insufficient", "stable", "drift"]

LOST = "lost"
"""Outcome of a retraining of which nothing more was heard."""
_LOST_AFTER = timedelta(hours=48)
"""No earlier: VGG16's training may take twelve hours and be tried four times. A late answer replaces `lost`."""


@dataclass(frozen=True)
class PastRetraining:
    """One row of `retrainings`: asked for, then started by a trainer, then finished; None for what is to come."""

    id: int
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class RetrainingDecision:
    """Whether a retraining is due, and why or why not; `asked_before` is the id of the open one that is handed on."""

    due: bool
    reason: str
    asked_before: int | None = None


def verdict(n: int, min_predictions: int, drift: DriftResult | None) -> Verdict:
    """The word for a window of `n` predictions. Too few of them show nothing: that is `insufficient`, never `stable`.

    Raises:
        ValueError: when there are enough predictions and no test was made of them.
    """
    if n < min_predictions:
        return "insufficient"
    if drift is None:
        raise ValueError(f"{n} predictions are enough to be judged, and no drift test was handed over")
    return "drift" if drift.drifted else "stable"


def alert_due(window_verdict: Verdict) -> bool:
    """Every window that drifted is told; a missing verdict and a stable one are not."""
    return window_verdict == "drift"


def lost_retrainings(history: Sequence[PastRetraining], now: datetime) -> tuple[int, ...]:
    """Ids of the open retrainings that began 48 hours ago or more: one that was never started, with its request."""
    return tuple(
        past.id
        for past in history
        if past.finished_at is None and now - (past.started_at or past.requested_at) >= _LOST_AFTER
    )


def retraining_decision(
    window_verdict: Verdict, history: Sequence[PastRetraining], now: datetime, cooldown: timedelta
) -> RetrainingDecision:
    """Whether to retrain: on drift, one at a time, and at most one in each cool-down, counted from its request.

    One that was asked for and that no trainer has started is due whatever the window says: who was to start it may
    have died. Being asked twice must be harmless to the orchestrator.

    Args:
        window_verdict: this window's.
        history: earlier retrainings in any order; those that `lost_retrainings` names must be closed before.
        now: with time zone, as the times in `history`.
        cooldown: keeps a lasting drift, or a training that fails each time, from training without end.
    """
    for past in history:
        if past.finished_at is None and past.started_at is None:
            asked = f"retraining {past.id} was asked for at {_clock(past.requested_at)} and has not started yet"
            return RetrainingDecision(True, asked, asked_before=past.id)
    if window_verdict != "drift":
        return RetrainingDecision(False, f"the window is {window_verdict}, not drift")
    running = [past.started_at for past in history if past.finished_at is None and past.started_at is not None]
    if running:
        return RetrainingDecision(False, f"one is running since {_clock(min(running))}")
    latest = max((past.requested_at for past in history), default=None)
    if latest is not None and now < latest + cooldown:
        return RetrainingDecision(
            False, f"cool-down until {_clock(latest + cooldown)} (the last one was asked for at {_clock(latest)})"
        )
    before = "no retraining was asked for before" if latest is None else f"the last was asked for at {_clock(latest)}"
    return RetrainingDecision(True, f"the window drifted, and {before}")


def _clock(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="seconds")
