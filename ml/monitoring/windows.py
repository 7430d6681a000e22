"""The monitor's memory in PostgreSQL: which predictions were judged, how, and what followed.

Owns the tables `monitor_windows`, `alerts` and `retrainings`. No prediction is judged twice, and none of the champion's
is stepped over. What a version predicted after its last window and before it lost the alias is not judged, unless it
becomes champion again.

- A version's watermark is the highest `last_id` of its judged windows. `insufficient` windows do not count: their
  predictions stay and accumulate.
- `MonitorLock` lets one monitor work at a time, and the verdict with all that follows from it is committed in one
  transaction over the lock's own connection. A monitor that dies, or whose connection does, has written nothing, and
  the next one judges the same predictions again.
- `settled_id` bounds a window to ids below which nothing can still appear, so that a slow writer's rows are never
  stepped over.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg2

from ml.database import connect, transaction
from ml.errors import DatabaseUnavailable, InputInvalid
from ml.monitoring.alerts import Alert
from ml.monitoring.performance import LivePerformance
from ml.monitoring.policy import (
    LOST,
    PastRetraining,
    RetrainingDecision,
    Verdict,
    lost_retrainings,
    retraining_decision,
)
from ml.monitoring.statistics import DriftResult

logger = logging.getLogger(__name__)

_LOCK_WAIT = "30s"
_SETTLE_WAIT = "5s"
_REFRESHED_WINDOWS = 50


@dataclass(frozen=True)
class JudgedWindow:
    """What is written of a window. `ids` is None for a window without predictions."""

    model_name: str
    model_version: int
    ids: tuple[int, int] | None
    n: int
    verdict: Verdict
    drift: DriftResult | None
    performance: LivePerformance
    report: str | None


@dataclass(frozen=True)
class TrainingRequest:
    """What to train as the champion was trained; None where its version does not say."""

    architecture: str
    dataset_id: str | None
    recipe: str | None


@dataclass(frozen=True)
class RecordedRetraining:
    """What was decided about retraining; `retraining_id` is set when it is due."""

    decision: RetrainingDecision
    retraining_id: int | None
    request: TrainingRequest


class MonitorLock:
    """The right to judge windows, and the one connection over which verdicts are written while it is held."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A transaction: yields a cursor, commits at the end, rolls back on an exception.

        Raises:
            DatabaseUnavailable: when PostgreSQL went away since; the lock is lost then and nothing is written.
        """
        try:
            with self._connection, self._connection.cursor() as cursor:
                yield cursor
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            raise DatabaseUnavailable(
                f"PostgreSQL went away while the monitor worked: {str(error).strip()}; nothing was written.",
                fix="see that it runs (`make up`), then run `cifar10 monitor` again: it judges the same predictions.",
            ) from error


@contextmanager
def monitor_lock(database_url: str) -> Iterator[MonitorLock]:
    """Waits up to 30 s for other monitors and holds the right to judge until the block ends.

    A session lock: PostgreSQL itself gives it back when this process or its connection dies.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked, or another monitor works for longer than that.
    """
    connection = connect(database_url)
    try:
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'")
                cursor.execute("SELECT pg_advisory_lock(hashtext('monitor'))")
        except psycopg2.errors.LockNotAvailable as error:
            raise DatabaseUnavailable(
                f"Another monitor has been at work for more than {_LOCK_WAIT}.",
                fix="wait until it is done, then run `cifar10 monitor` again.",
            ) from error
        except psycopg2.OperationalError as error:
            raise DatabaseUnavailable(
                f"PostgreSQL could not be asked: {str(error).strip()}.", fix="see that it runs (`make up`)."
            ) from error
        yield MonitorLock(connection)
    finally:
        connection.close()


def settled_id(database_url: str) -> int:
    """The highest prediction id below which no row can still appear; 0 for an empty table.

    Ids are drawn at insert and seen at commit, so a slow writer's lower id can appear after a higher one. A SHARE
    lock waits for the writers under way (an INSERT locks the table before it draws an id) and lets go at once; the
    server inserts off the request path, so no request waits for it.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked, or some writer stays open for more than five seconds.
    """
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL lock_timeout = '{_SETTLE_WAIT}'")
        cursor.execute("LOCK TABLE predictions IN SHARE MODE")
        cursor.execute("SELECT coalesce(max(id), 0) FROM predictions")
        return int(cursor.fetchone()[0])


def watermark(database_url: str, model_name: str, model_version: int) -> int:
    """The last prediction id of this version that was judged; 0 when none was."""
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT coalesce(max(last_id), 0) FROM monitor_windows "
            "WHERE model_name = %s AND model_version = %s AND verdict <> 'insufficient'",
            (model_name, model_version),
        )
        return int(cursor.fetchone()[0])


def count_after(database_url: str, model_name: str, model_version: int, after_id: int) -> int:
    """How many predictions of this version have an id above `after_id`."""
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM predictions WHERE model_name = %s AND model_version = %s AND id > %s",
            (model_name, model_version, after_id),
        )
        return int(cursor.fetchone()[0])


def insert_window(cursor: Any, window: JudgedWindow) -> int:
    """Writes a window's row; returns its id. To be called inside `MonitorLock.writing`."""
    first_id, last_id = window.ids or (None, None)
    performance = window.performance
    cursor.execute(
        "INSERT INTO monitor_windows (model_name, model_version, first_id, last_id, n, verdict, p_value, statistics, "
        "labelled, live_accuracy, report) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING id",
        (
            *(window.model_name, window.model_version, first_id, last_id, window.n, window.verdict),
            window.drift.p_value if window.drift else None,
            json.dumps(_statistics(window), allow_nan=False),
            *(performance.labelled, performance.accuracy, window.report),
        ),
    )
    return int(cursor.fetchone()[0])


def _statistics(window: JudgedWindow) -> dict[str, object]:
    performance = window.performance
    found: dict[str, object] = {
        "estimated_accuracy": performance.estimated_accuracy,
        "accuracy_interval": performance.interval,
    }
    if window.drift is not None:
        found |= {
            "alpha": window.drift.alpha,
            "n_reference": window.drift.n_reference,
            "drifted_columns": list(window.drift.drifted_columns),
            "columns": {
                test.name: {
                    "method": test.method,
                    "statistic": test.statistic,
                    "p_value": test.p_value,
                    "adjusted_p_value": test.adjusted_p_value,
                }
                for test in window.drift.columns
            },
        }
    return found


def decide_retraining(
    cursor: Any, *, window_id: int, verdict: Verdict, request: TrainingRequest, cooldown: timedelta, now: datetime
) -> RecordedRetraining:
    """Closes lost retrainings, decides, and claims the one open place when a new retraining is due.

    One that was claimed before and not started is handed on as it was asked for. The unique index
    `one_retraining_at_a_time` has the last word: whoever does not get the row does not claim.
    """
    lost = lost_retrainings(_history(cursor), now)
    if lost:
        logger.warning("Nothing more was heard of retraining %s: closed as lost", ", ".join(map(str, lost)))
        cursor.execute(
            "UPDATE retrainings SET finished_at = %s, outcome = %s WHERE id = ANY(%s)", (now, LOST, list(lost))
        )
    decision = retraining_decision(verdict, _history(cursor), now, cooldown)
    if decision.due and decision.asked_before is None:
        cursor.execute(
            "INSERT INTO retrainings (window_id, architecture, dataset_id, recipe, requested_at) "
            "VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING id",
            (window_id, request.architecture, request.dataset_id, request.recipe, now),
        )
        claimed = cursor.fetchone()
        if claimed is not None:
            return RecordedRetraining(decision, int(claimed[0]), request)
        decision = retraining_decision(verdict, _history(cursor), now, cooldown)
    if decision.asked_before is not None:
        cursor.execute(
            "SELECT architecture, dataset_id, recipe FROM retrainings WHERE id = %s", (decision.asked_before,)
        )
        return RecordedRetraining(decision, decision.asked_before, TrainingRequest(*cursor.fetchone()))
    return RecordedRetraining(decision, None, request)


def _history(cursor: Any) -> list[PastRetraining]:
    """The retrainings that a decision can turn on: the open ones and the latest."""
    cursor.execute(
        "SELECT id, requested_at, started_at, finished_at FROM retrainings "
        "WHERE finished_at IS NULL OR requested_at = (SELECT max(requested_at) FROM retrainings)"
    )
    return [PastRetraining(*row) for row in cursor.fetchall()]


def insert_alerts(cursor: Any, window_id: int, message: str, channels: Sequence[str]) -> None:
    """Writes an undelivered alert for each channel. To be called inside `MonitorLock.writing`."""
    for channel in channels:
        cursor.execute(
            "INSERT INTO alerts (window_id, message, channel) VALUES (%s, %s, %s)", (window_id, message, channel)
        )


def deliver_alerts(database_url: str, send: Callable[[Alert], bool]) -> None:
    """Hands each undelivered alert to `send`, oldest first, and closes those for which it answers True.

    An alert's row is locked while it is sent, so that of two that deliver at once only one sends it.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked; what is open then stays open.
    """
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM alerts WHERE delivered_at IS NULL ORDER BY id")
        found = [row[0] for row in cursor.fetchall()]
    for alert_id in found:
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT id, channel, message FROM alerts WHERE id = %s AND delivered_at IS NULL FOR UPDATE SKIP LOCKED",
                (alert_id,),
            )
            row = cursor.fetchone()
            if row is not None and send(Alert(*row)):
                cursor.execute("UPDATE alerts SET delivered_at = now() WHERE id = %s", (alert_id,))


def refresh_live_accuracy(cursor: Any, model_name: str, model_version: int) -> None:
    """Counts the labels that came in after their window was judged, for the version's latest fifty windows."""
    cursor.execute(
        """
        WITH latest AS (
            SELECT id, first_id, last_id FROM monitor_windows
            WHERE model_name = %(name)s AND model_version = %(version)s AND verdict <> 'insufficient'
            ORDER BY id DESC LIMIT %(windows)s
        ), counted AS (
            SELECT latest.id, count(f.label) AS labelled, avg((f.label = p.class_id)::int) AS accuracy
            FROM latest
            JOIN predictions p ON p.model_name = %(name)s AND p.model_version = %(version)s
                              AND p.id BETWEEN latest.first_id AND latest.last_id
            JOIN feedback f USING (request_id, item_index)
            GROUP BY latest.id
        )
        UPDATE monitor_windows w SET labelled = counted.labelled, live_accuracy = counted.accuracy
        FROM counted WHERE w.id = counted.id AND (w.labelled, w.live_accuracy) IS DISTINCT FROM
                                                 (counted.labelled::int, counted.accuracy::double precision)
        """,
        {"name": model_name, "version": model_version, "windows": _REFRESHED_WINDOWS},
    )


def mark_started(database_url: str, retraining_id: int) -> None:
    """Notes that a trainer took a retraining, so that it is not handed on again. Idempotent: the first time stands.

    Raises:
        InputInvalid: when no retraining has this id.
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    _update_retraining(
        database_url,
        retraining_id,
        "UPDATE retrainings SET started_at = coalesce(started_at, now()) WHERE id = %(id)s",
        {},
    )


def close_retraining(database_url: str, retraining_id: int, outcome: str) -> None:
    """Notes how a retraining ended. Idempotent; a late answer replaces `lost`, and no other outcome is replaced.

    Raises:
        InputInvalid: when no retraining has this id.
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    _update_retraining(
        database_url,
        retraining_id,
        "UPDATE retrainings SET finished_at = coalesce(finished_at, now()), outcome = "
        "CASE WHEN finished_at IS NULL OR outcome = %(lost)s THEN %(outcome)s ELSE outcome END WHERE id = %(id)s",
        {"lost": LOST, "outcome": outcome},
    )


def _update_retraining(database_url: str, retraining_id: int, statement: str, values: dict[str, str]) -> None:
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(statement, {**values, "id": retraining_id})
        if cursor.rowcount == 0:
            raise InputInvalid(
                f"No retraining has the id {retraining_id}.",
                fix="hand over the `retraining_id` of the monitor's result.",
            )
