"""Every prediction, kept in PostgreSQL: the server writes here, the monitor reads here.

Owns the tables `predictions` and `feedback` (schema: `deploy/postgres/migrations`). `PredictionLog` takes predictions
off the request path (`ml.monitoring.batch_writer`). `read_window` gives the monitor its rows; what they mean is decided
in `ml.monitoring.statistics` and `policy`.
"""

import logging
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import numpy as np
import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case
from psycopg2.extras import execute_values

from ml.database import transaction
from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import DatabaseUnavailable, InputInvalid, PredictionNotFound
from ml.monitoring.batch_writer import BatchWriter
from ml.monitoring.image_statistics import STATISTIC_NAMES, image_statistics

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""Stands in `Window.labels` where nobody has said what the image shows."""

MODEL_NAME = "cifar10-classifier"

_INSERT = f"""
INSERT INTO predictions (request_id, item_index, created_at, model_name, model_version, class_id, probabilities,
                         {", ".join(STATISTIC_NAMES)}, image)
VALUES %s ON CONFLICT (request_id, item_index) DO NOTHING
"""  # noqa: S608 - the names are constants of this program
_ROW = f"(%s, %s, %s, %s, %s, %s, %s::real[], {', '.join(['%s'] * len(STATISTIC_NAMES))}, %s)"

# Writers take turns, so that ids become visible in their own order: a reader that remembers the last id it saw
# (the monitor's watermark) can then never step over a row of a slower writer.
_WRITERS_TAKE_TURNS = "SELECT pg_advisory_xact_lock(hashtext('predictions writer'))"


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
                "INSERT INTO feedback (request_id, item_index, label) VALUES (%s::uuid, %s, %s) "
                "ON CONFLICT (request_id, item_index) DO UPDATE SET label = excluded.label, created_at = now() "
                "RETURNING xmax = 0",  # a row that was only just inserted has never been updated or locked
                (str(request_id), index, label),
            )
            return bool(cursor.fetchone()[0])
    except (psycopg2.errors.ForeignKeyViolation, psycopg2.errors.NumericValueOutOfRange) as error:
        raise PredictionNotFound(
            f"No prediction {request_id} with index {index} is in the log.",
            fix="send the request_id of a reply of /v1/predict, and the index of one of its predictions (from 0).",
        ) from error


class PredictionLog(BatchWriter[LoggedPrediction]):
    """Takes predictions from the request path and writes them to PostgreSQL in the background; see `BatchWriter`.

    A row is 3.2 kB.
    """

    _logger, _name = logger, "Prediction log"

    def _insert(self, connection: Connection, batch: list[LoggedPrediction]) -> None:
        _insert(connection, batch)

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


def _insert(connection: Connection, batch: list[LoggedPrediction]) -> None:
    statistics = image_statistics(np.concatenate([item.images for item in batch]))
    looks = iter(np.stack(list(statistics.values()), axis=1).tolist())
    rows = [
        (
            str(item.request_id),
            index,
            item.created_at,
            item.model_name,
            item.model_version,
            int(probabilities.argmax()),
            probabilities.tolist(),
            *next(looks),
            psycopg2.Binary(image.tobytes()),
        )
        for item in batch
        for index, (probabilities, image) in enumerate(zip(item.probabilities, item.images, strict=True))
    ]
    with connection, connection.cursor() as cursor:
        cursor.execute(_WRITERS_TAKE_TURNS)
        execute_values(cursor, _INSERT, rows, template=_ROW, page_size=len(rows))
