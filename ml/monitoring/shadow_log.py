"""What the challenger predicted unseen, kept in PostgreSQL: the server writes here, a promotion reads here.

Owns the table `shadow_predictions` (schema: `deploy/postgres/migrations`). What its figures mean for a promotion is
decided by whoever asks for them.
"""

import logging
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case
from psycopg2.extras import execute_values

from ml.database import transaction
from ml.monitoring.batch_writer import BatchWriter
from ml.traffic import Mirrored

logger = logging.getLogger(__name__)

_INSERT = """
INSERT INTO shadow_predictions (request_id, item_index, created_at, champion_version, challenger_version,
                                champion_class, challenger_class, challenger_probabilities, champion_ms, challenger_ms,
                                failure)
VALUES %s ON CONFLICT (request_id, item_index, challenger_version) DO NOTHING
"""
_ROW = "(%s, %s, %s, %s, %s, %s, %s, %s::real[], %s, %s, %s)"

_READ = """
SELECT request_id, champion_class, challenger_class, champion_ms, challenger_ms, failure IS NOT NULL
FROM shadow_predictions
WHERE champion_version = %s AND challenger_version = %s AND created_at >= %s
ORDER BY created_at, request_id, item_index LIMIT %s
"""


@dataclass(frozen=True)
class Shadow:
    """What came of mirroring one champion's requests to one challenger.

    `n` counts mirrored images that the challenger answered or failed on; `disagreements` those of which it said
    another class, `failures` those on which it failed (a failure is no disagreement). `champion_ms` and
    `challenger_ms` are float64 (requests,), oldest first: time in the engine, of the whole request, in milliseconds.
    Both hold the requests on which the challenger did not fail, and the same place is the same request.
    """

    n: int
    disagreements: int
    failures: int
    champion_ms: np.ndarray
    challenger_ms: np.ndarray


def read_shadow(
    database_url: str, champion: int, challenger: int, since: datetime, *, limit: int | None = None
) -> Shadow:
    """The images that were mirrored from `champion` to `challenger` at `since` or later.

    Args:
        database_url: the predictions database.
        champion: the version that answered.
        challenger: the version that was shown the images.
        since: with a time zone; compared with the server's clock at the time of the answer.
        limit: the oldest so many images; None: all.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(_READ, (champion, challenger, since, limit))
        rows = cursor.fetchall()
    failures = sum(failed for *_, failed in rows)
    disagreements = sum(answered != predicted for _, answered, predicted, _, _, failed in rows if not failed)
    # One entry a request: its times stand on each of its rows.
    times = {request: (mine, other) for request, _, _, mine, other, failed in rows if not failed}
    both = np.array(list(times.values()), np.float64).reshape(len(times), 2)
    return Shadow(len(rows), disagreements, failures, champion_ms=both[:, 0], challenger_ms=both[:, 1])


class ShadowLog(BatchWriter[Mirrored]):
    """Takes what the challenger predicted and writes it to PostgreSQL in the background; see `BatchWriter`.

    A row is 0.2 kB.
    """

    _logger, _name = logger, "Shadow log"

    def _insert(self, connection: Connection, batch: list[Mirrored]) -> None:
        _insert(connection, batch)

    def _rows_of(self, item: Mirrored) -> int:
        return len(item.champion_classes)


def _insert(connection: Connection, batch: list[Mirrored]) -> None:
    rows = [row for item in batch for row in _rows(item)]
    with connection, connection.cursor() as cursor:
        execute_values(cursor, _INSERT, rows, template=_ROW, page_size=len(rows))


def _rows(item: Mirrored) -> list[tuple[object, ...]]:
    n = len(item.champion_classes)
    if item.probabilities is None:
        answers: list[tuple[int | None, list[float] | None]] = [(None, None)] * n
    else:
        answers = [(int(row.argmax()), row.tolist()) for row in item.probabilities]
    return [
        (
            str(item.request_id),
            index,
            item.created_at,
            item.champion_version,
            item.challenger_version,
            int(item.champion_classes[index]),
            predicted,
            probabilities,
            item.champion_ms,
            item.challenger_ms,
            item.failure,
        )
        for index, (predicted, probabilities) in enumerate(answers)
    ]
