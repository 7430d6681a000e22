"""How long predictions are kept: removes whole days of them, with their requests, feedback and shadow predictions.

Owns nothing but the removal. A day is dropped as a partition, which takes no time and leaves no holes.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import psycopg2

from ml.database import transaction
from ml.errors import DatabaseUnavailable
from ml.monitoring.prediction_log import WRITERS_TAKE_TURNS

logger = logging.getLogger(__name__)

_LOCK_WAIT = "5s"

_DAYS = """
SELECT to_date(right(part.relname, 8), 'YYYYMMDD') FROM pg_inherits
JOIN pg_class part ON part.oid = inhrelid WHERE inhparent = 'predictions'::regclass ORDER BY 1
"""


@dataclass(frozen=True)
class Removed:
    """What was removed: everything that was logged before `before`, a day of UTC."""

    before: date
    days: list[date]
    requests: int
    shadow_predictions: int


def remove_old(database_url: str, keep_days: int, now: datetime | None = None) -> Removed:
    """Removes the days that are more than `keep_days` before today; idempotent.

    Today is by this machine's clock or by the database's, whichever is behind: neither removes anything too early by
    jumping ahead.

    Args:
        database_url: the predictions database.
        keep_days: at least 1.
        now: this machine's clock, in UTC.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked, or a reader (a backup) holds a day for long. What was
            removed until then stays so.
    """
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT now()")
        today = min(now or datetime.now(UTC), cursor.fetchone()[0]).astimezone(UTC).date()
        cursor.execute(_DAYS)
        days = [row[0] for row in cursor.fetchall()]
    before = today - timedelta(days=keep_days)
    old = [day for day in days if day < before]
    # Requests and feedback first: should it break off in between, the next run finds the day and goes on.
    limit = datetime.combine(before, time(), UTC)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM requests WHERE created_at < %s", (limit,))
        requests = cursor.rowcount
        cursor.execute("DELETE FROM shadow_predictions WHERE created_at < %s", (limit,))
        shadows = cursor.rowcount
        cursor.execute("DELETE FROM prediction_gaps WHERE ended_at < %s AND told_at IS NOT NULL", (limit,))
    for day in old:
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'")
            try:
                cursor.execute(WRITERS_TAKE_TURNS)
                cursor.execute("SELECT drop_prediction_day(%s)", (day,))
            except psycopg2.errors.LockNotAvailable as error:
                raise DatabaseUnavailable(
                    f"The predictions of {day} could not be removed: somebody has read or written for {_LOCK_WAIT}.",
                    fix="wait until that is done (a backup?), then run `cifar10 retain` again.",
                ) from error
    if old:
        logger.info("Removed %d days of predictions before %s: %d requests", len(old), before, requests)
    return Removed(before, old, requests, shadows)
