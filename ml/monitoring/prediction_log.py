"""Every prediction, kept in PostgreSQL: the server writes here, the monitor reads here.

Owns the tables `requests`, `predictions` and `feedback` (schema: `deploy/postgres/migrations`). `requests` says which
ids were logged, so that each is logged once; `predictions` has a partition for each day of `created_at`.
`PredictionLog` takes predictions off the request path (`ml.monitoring.batch_writer`). `read_window` gives the monitor
its rows; what they mean is decided in `ml.monitoring.statistics` and `policy`. How old they get is
`ml.monitoring.retention`'s.
"""

import io
import logging
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from typing import Any
from uuid import UUID

import numpy as np
import psycopg2

from ml.database import transaction
from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import DatabaseUnavailable, InputInvalid, PredictionNotFound
from ml.monitoring.batch_writer import BatchWriter
from ml.monitoring.image_statistics import STATISTIC_NAMES, image_statistics

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""Stands in `Window.labels` where nobody has said what the image shows."""

MODEL_NAME = "cifar10-classifier"

# In the file: id, microseconds since 1970, version, and the length of the name, which follows; then probabilities and
# images as they lie in memory.
_HEAD = struct.Struct("<16sqiH")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PROBABILITY_BYTES = 4 * NUM_CLASSES
_IMAGE_BYTES = int(np.prod(IMAGE_SHAPE))

_NEW_REQUESTS = """
INSERT INTO requests (request_id, created_at, images)
SELECT * FROM unnest(%s::uuid[], %s::timestamptz[], %s::integer[]) ON CONFLICT DO NOTHING RETURNING request_id
"""
_COPY = f"""
COPY predictions (request_id, item_index, created_at, model_name, model_version, class_id, probabilities,
                  {", ".join(STATISTIC_NAMES)}, image) FROM STDIN (FORMAT binary)
"""
# PostgreSQL's own format (documentation of COPY, "Binary Format"): every field after its length, big-endian; times in
# microseconds since 2000.
_COPY_BEGIN = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_COPY_END = struct.pack(">h", -1)
_POSTGRES_EPOCH_US = (datetime(2000, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_REAL = np.dtype([("size", ">i4"), ("value", ">f4")])
_REAL_OID = 700

# Writers take turns, so that ids become visible in their own order: a reader that remembers the last id it saw
# (the monitor's watermark) can then never step over a row of a slower writer.
WRITERS_TAKE_TURNS = "SELECT pg_advisory_xact_lock(hashtext('predictions writer'))"


@dataclass(frozen=True)
class LoggedPrediction:
    """One request's predictions, as they go into the log.

    `probabilities` is float32 (n, 10) and `images` uint8 (n, 32, 32, 3), what the model saw; `created_at` is in UTC.
    """

    request_id: UUID
    created_at: datetime
    model_name: str
    model_version: int
    probabilities: np.ndarray
    images: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.shape != (n, *IMAGE_SHAPE) or self.images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 (n, 32, 32, 3), not {self.images.dtype} {self.images.shape}")
        if self.probabilities.shape != (n, NUM_CLASSES):
            raise ValueError(f"probabilities must be ({n}, {NUM_CLASSES}), not {self.probabilities.shape}")


@dataclass(frozen=True)
class Window:
    """Predictions of one model version, oldest first.

    `ids` int64 (n,), ascending; `class_ids` int64 (n,); `probabilities` float32 (n, 10); `statistics` float32 (n,)
    under each of `image_statistics.STATISTIC_NAMES`; `labels` int64 (n,), `NO_LABEL` where there is no feedback.
    """

    ids: np.ndarray
    class_ids: np.ndarray
    probabilities: np.ndarray
    statistics: dict[str, np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def read_window(
    database_url: str, model_version: int, after_id: int, limit: int, *, model_name: str = MODEL_NAME
) -> Window:
    """The oldest `limit` predictions of a version whose id is above `after_id` (0: from the start).

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    query = f"""
        SELECT p.id, p.class_id, p.probabilities, {", ".join(f"p.{name}" for name in STATISTIC_NAMES)},
               coalesce(f.label, {NO_LABEL})
        FROM predictions p LEFT JOIN feedback f USING (request_id, item_index)
        WHERE p.model_name = %s AND p.model_version = %s AND p.id > %s
        ORDER BY p.id LIMIT %s
    """  # noqa: S608 - only constants of this program are formatted in
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(query, (model_name, model_version, after_id, limit))
        rows = cursor.fetchall()
    columns = list(zip(*rows, strict=True)) or [()] * (len(STATISTIC_NAMES) + 4)
    ids, class_ids, probabilities, *statistics, labels = columns
    return Window(
        ids=np.array(ids, np.int64),
        class_ids=np.array(class_ids, np.int64),
        probabilities=np.array(probabilities, np.float32).reshape(len(rows), NUM_CLASSES),
        statistics={
            name: np.array(values, np.float32) for name, values in zip(STATISTIC_NAMES, statistics, strict=True)
        },
        labels=np.array(labels, np.int64),
    )


def record_feedback(database_url: str, request_id: UUID, index: int, label: int) -> bool:
    """Keeps what an image really shows. Saying it again replaces what was said before.

    Args:
        database_url: the predictions database.
        request_id: the prediction's request.
        index: which image of that request, from 0.
        label: class id, 0-9.

    Returns:
        True where this is the first feedback on that image, False where it replaced an earlier one.

    Raises:
        PredictionNotFound: when no such prediction is in the log.
        InputInvalid: when `label` is no class id.
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    if not 0 <= label < NUM_CLASSES:
        raise InputInvalid(f"{label} is no class id.", fix="send one of 0-9.")
    try:
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO feedback (request_id, item_index, label) "
                "SELECT request_id, %(index)s, %(label)s FROM requests "
                "WHERE request_id = %(request_id)s::uuid AND %(index)s < images "
                "ON CONFLICT (request_id, item_index) DO UPDATE SET label = excluded.label, created_at = now() "
                "RETURNING xmax = 0",  # a row that was only just inserted has never been updated or locked
                {"request_id": str(request_id), "index": index, "label": label},
            )
            kept = cursor.fetchone()
    except (psycopg2.errors.ForeignKeyViolation, psycopg2.errors.NumericValueOutOfRange):
        kept = None  # removed by its age meanwhile; or no such index can be
    if kept is None:
        raise PredictionNotFound(
            f"No prediction {request_id} with index {index} is in the log.",
            fix="send the request_id of a reply of /v1/predict, and the index of one of its predictions (from 0).",
        )
    return bool(kept[0])


class PredictionLog(BatchWriter[LoggedPrediction]):
    """Takes predictions from the request path and writes them to PostgreSQL in the background; see `BatchWriter`.

    A row is 3.2 kB, on disk too.
    """

    _logger, _name = logger, "Prediction log"

    def _encode(self, item: LoggedPrediction) -> bytes:
        return _encode(item)

    def _decode(self, payload: bytes, rows: int) -> LoggedPrediction:
        return _decode(payload, rows)

    def _insert(self, cursor: Any, items: list[LoggedPrediction]) -> None:
        _insert(cursor, items)

    def _rows_of(self, item: LoggedPrediction) -> int:
        return len(item.images)

    def record_feedback(self, request_id: UUID, index: int, label: int) -> bool:
        """As the function of this name, also for a prediction that is still on its way to the database.

        Raises:
            PredictionNotFound: when no such prediction was ever logged.
            InputInvalid: when `label` is no class id.
            DatabaseUnavailable: when PostgreSQL cannot be asked, or has not yet taken what is queued.
        """
        try:
            return record_feedback(self._database_url, request_id, index, label)
        except PredictionNotFound:
            if not self.flush(timeout=2.0):
                raise DatabaseUnavailable(
                    "PostgreSQL has not taken the latest predictions yet.", fix="send the feedback again in a moment."
                ) from None
        return record_feedback(self._database_url, request_id, index, label)


def _encode(item: LoggedPrediction) -> bytes:
    name = item.model_name.encode("utf-8", "backslashreplace")
    head = _HEAD.pack(item.request_id.bytes, (item.created_at - _EPOCH) // _MICROSECOND, item.model_version, len(name))
    return b"".join((head, name, item.probabilities.astype("<f4", copy=False).tobytes(), item.images.tobytes()))


def _decode(payload: bytes, rows: int) -> LoggedPrediction:
    try:
        request_id, microseconds, version, length = _HEAD.unpack_from(payload)
        at = _HEAD.size + length
        name = payload[_HEAD.size : at].decode()
        created_at = _EPOCH + timedelta(microseconds=microseconds)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"no prediction: {error}") from error
    images_at = at + rows * _PROBABILITY_BYTES
    if len(payload) != images_at + rows * _IMAGE_BYTES:
        raise ValueError(f"{len(payload)} bytes are not {rows} predictions")
    return LoggedPrediction(
        request_id=UUID(bytes=request_id),
        created_at=created_at,
        model_name=name,
        model_version=version,
        probabilities=np.frombuffer(payload, "<f4", rows * NUM_CLASSES, at).reshape(rows, NUM_CLASSES),
        images=np.frombuffer(payload, np.uint8, rows * _IMAGE_BYTES, images_at).reshape(rows, *IMAGE_SHAPE),
    )


def _insert(cursor: Any, items: list[LoggedPrediction]) -> None:
    """Writes what is not in the database yet; of two items with one id the first."""
    by_id: dict[str, LoggedPrediction] = {}
    for item in items:
        by_id.setdefault(str(item.request_id), item)
    cursor.execute(WRITERS_TAKE_TURNS)
    days = sorted({item.created_at.astimezone(UTC).date() for item in by_id.values()})
    cursor.execute("SELECT ensure_prediction_days(%s::date[])", (days,))
    cursor.execute(
        _NEW_REQUESTS,
        (list(by_id), [item.created_at for item in by_id.values()], [len(item.images) for item in by_id.values()]),
    )
    new = {row[0] for row in cursor.fetchall()}
    content = [_COPY_BEGIN]
    # In their order, since ids are given in the order of the rows.
    for name, group in groupby((by_id[key] for key in by_id if key in new), key=lambda item: item.model_name):
        content.append(_copied(name, list(group)))
    content.append(_COPY_END)
    cursor.copy_expert(_COPY, io.BytesIO(b"".join(content)), size=1 << 16)


@lru_cache(maxsize=16)
def _row_type(name_bytes: int) -> np.dtype:
    """A row of `_COPY` with a model name of so many bytes, as it goes over the wire."""
    fields: list[tuple[Any, ...]] = [
        ("request_id", "V16"),
        ("item_index", ">i2"),
        ("created_at", ">i8"),
        ("model_name", f"V{name_bytes}"),
        ("model_version", ">i4"),
        ("class_id", ">i2"),
        ("probabilities", [("dimensions", ">i4", (5,)), ("values", _REAL, (NUM_CLASSES,))]),
    ]
    sized = [part for name, *rest in fields for part in ((f"{name}_size", ">i4"), (name, *rest))]
    looks = ("looks", _REAL, (len(STATISTIC_NAMES),))
    return np.dtype([("fields", ">i2"), *sized, looks, ("image_size", ">i4"), ("image", np.uint8, (_IMAGE_BYTES,))])


def _copied(model_name: str, items: list[LoggedPrediction]) -> bytes:
    """The rows of items of one model in the binary format of COPY."""
    counts = [len(item.images) for item in items]
    images = np.concatenate([item.images for item in items])
    probabilities = np.concatenate([item.probabilities for item in items])
    name = model_name.encode()
    rows = np.zeros(len(images), _row_type(len(name)))
    rows["fields"] = 7 + len(STATISTIC_NAMES) + 1
    for field in ("request_id", "item_index", "created_at", "model_name", "model_version", "class_id", "probabilities",
                  "image"):  # fmt: skip
        rows[f"{field}_size"] = rows.dtype[field].itemsize
    rows["request_id"] = np.repeat(np.array([item.request_id.bytes for item in items], "V16"), counts)
    rows["item_index"] = np.concatenate([np.arange(count) for count in counts])
    times = [(item.created_at - _EPOCH) // _MICROSECOND - _POSTGRES_EPOCH_US for item in items]
    rows["created_at"] = np.repeat(np.array(times, np.int64), counts)
    rows["model_name"] = np.void(name)
    rows["model_version"] = np.repeat([item.model_version for item in items], counts)
    rows["class_id"] = probabilities.argmax(axis=1)
    # One dimension, no NULL, of reals, ten of them, counted from one.
    rows["probabilities"]["dimensions"] = (1, 0, _REAL_OID, NUM_CLASSES, 1)
    looks = np.stack(list(image_statistics(images).values()), axis=1)
    for reals, values in ((rows["probabilities"]["values"], probabilities), (rows["looks"], looks)):
        reals["size"] = _REAL["value"].itemsize
        reals["value"] = values
    rows["image"] = images.reshape(len(images), -1)
    return rows.tobytes()
