"""What the challenger predicted unseen, kept in PostgreSQL: the server writes here, a promotion reads here.

Owns the table `shadow_predictions` (schema: `deploy/postgres/migrations`). What its figures mean for a promotion is
decided by whoever asks for them.
"""

import logging
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import numpy as np
from psycopg2.extras import execute_values

from ml.database import transaction
from ml.datasets.labels import NUM_CLASSES
from ml.monitoring.batch_writer import BatchWriter
from ml.traffic import Mirrored

logger = logging.getLogger(__name__)

# In the file: id, microseconds since 1970, both versions, both times, whether it failed; then the champion's classes,
# and the challenger's probabilities, or why there are none.
_HEAD = struct.Struct("<16sqiidd?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

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

    def _encode(self, item: Mirrored) -> bytes:
        return _encode(item)

    def _decode(self, payload: bytes, rows: int) -> Mirrored:
        return _decode(payload, rows)

    def _insert(self, cursor: Any, items: list[Mirrored]) -> None:
        rows = [row for item in items for row in _rows(item)]
        execute_values(cursor, _INSERT, rows, template=_ROW, page_size=len(rows))

    def _rows_of(self, item: Mirrored) -> int:
        return len(item.champion_classes)


def _encode(item: Mirrored) -> bytes:
    head = _HEAD.pack(
        item.request_id.bytes,
        (item.created_at - _EPOCH) // _MICROSECOND,
        item.champion_version,
        item.challenger_version,
        item.champion_ms,
        item.challenger_ms or 0.0,
        item.failure is not None,
    )
    classes = item.champion_classes.astype(np.int8).tobytes()
    if item.probabilities is None:
        return head + classes + (item.failure or "").encode("utf-8", "backslashreplace")
    return head + classes + item.probabilities.astype("<f4").tobytes()


def _decode(payload: bytes, rows: int) -> Mirrored:
    try:
        request_id, microseconds, champion, challenger, champion_ms, challenger_ms, failed = _HEAD.unpack_from(payload)
        created_at = _EPOCH + timedelta(microseconds=microseconds)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"nothing mirrored: {error}") from error
    at = _HEAD.size
    rest = payload[at + rows :]
    return Mirrored(
        request_id=UUID(bytes=request_id),
        created_at=created_at,
        champion_version=champion,
        challenger_version=challenger,
        champion_classes=np.frombuffer(payload, np.int8, rows, at).astype(np.int64),
        probabilities=None if failed else np.frombuffer(rest, "<f4").reshape(rows, NUM_CLASSES),
        champion_ms=champion_ms,
        challenger_ms=None if failed else challenger_ms,
        failure=rest.decode() if failed else None,
    )


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
