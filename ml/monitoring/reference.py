"""The reference of a model version: its predictions on held-out images, kept beside it as `reference.parquet` (those of
its int8 form as `reference.int8.parquet`: what is compared is always what the form that serves says).

Owns the file's format, and the pair of types that every other part of monitoring compares: a `Sample` is a set of
predictions with the statistics of their images, a `Reference` is a sample whose labels are known. Making the
predictions is the training workflow's; comparing them is `ml.monitoring.statistics`'.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml.datasets.labels import CLASS_NAMES, NUM_CLASSES
from ml.errors import ModelInvalid, StorageError
from ml.files import write_whole
from ml.monitoring.image_statistics import STATISTIC_NAMES

PROBABILITY_NAMES: tuple[str, ...] = tuple(f"p_{class_id}" for class_id in range(NUM_CLASSES))
SHOWN_NAMES: Mapping[str, str] = {
    name: f"P({label})" for name, label in zip(PROBABILITY_NAMES, CLASS_NAMES, strict=True)
} | {name: name for name in STATISTIC_NAMES}
"""What people read for each numeric column: the class instead of its number."""
COLUMNS: tuple[str, ...] = ("label", "predicted", *PROBABILITY_NAMES, *STATISTIC_NAMES)

_SCHEMA = pa.schema(
    [
        *((name, pa.int8()) for name in ("label", "predicted")),
        *((name, pa.float32()) for name in (*PROBABILITY_NAMES, *STATISTIC_NAMES)),
    ]
)
_SUM_TOLERANCE = 1e-3  # a float32 softmax over ten classes sums to one within 1e-6; float16 engines within 5e-4


@dataclass(frozen=True)
class Sample:
    """Predictions with the statistics of the images they were made from.

    Attributes:
        class_ids: int64 (n,), the predicted class, 0..9.
        probabilities: float32 (n, 10), each row sums to one.
        statistics: one float32 (n,) array for each of STATISTIC_NAMES.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    statistics: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.class_ids)

    def columns(self) -> dict[str, np.ndarray]:
        """The numeric columns by name: ten class probabilities, then the image statistics; float32 (n,) each."""
        named = {name: self.probabilities[:, index] for index, name in enumerate(PROBABILITY_NAMES)}
        return named | {name: self.statistics[name] for name in STATISTIC_NAMES}


@dataclass(frozen=True)
class Reference(Sample):
    """Predictions on held-out images, with their true labels: int64 (n,), 0..9."""

    labels: np.ndarray


def write_reference(
    path: Path, labels: np.ndarray, probabilities: np.ndarray, statistics: Mapping[str, np.ndarray]
) -> Path:
    """Writes a reference to `path`, whole or not at all, and returns `path`.

    Args:
        path: where to; its folder is made.
        labels: integers (n,), 0..9: the true classes.
        probabilities: floats (n, 10): what the model that is being registered gave for these images.
        statistics: `ml.monitoring.image_statistics.image_statistics` of the same images: floats (n,) each.

    Raises:
        ModelInvalid: when the arrays are empty, disagree in length, or hold what a classifier cannot have given.
        StorageError: when the disk refuses.
    """
    reference = _checked(labels, probabilities, statistics, where=str(path))
    arrays = {"label": reference.labels, "predicted": reference.class_ids, **reference.columns()}
    table = pa.table({name: pa.array(arrays[name]).cast(_SCHEMA.field(name).type) for name in COLUMNS}, schema=_SCHEMA)
    content = io.BytesIO()
    try:
        pq.write_table(table, content, compression="zstd")
        write_whole(path, content.getvalue())
    except OSError as error:
        raise StorageError(
            f"The reference could not be written to {path}: {error}.",
            fix="make room on that disk and see that its folder can be written to, then train again.",
        ) from error
    return path


def read_reference(path: Path) -> Reference:
    """Reads what `write_reference` wrote.

    Raises:
        ModelInvalid: when the file is absent, broken, or not a reference.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise _invalid(f"{path} cannot be read as Parquet: {error}") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise _invalid(f"{path} has no column {', '.join(missing)}")
    try:
        column = {name: table.column(name).cast(_SCHEMA.field(name).type).to_numpy() for name in COLUMNS}
    except pa.ArrowInvalid as error:
        raise _invalid(f"{path} has a column of the wrong type: {error}") from error
    probabilities = np.stack([column[name] for name in PROBABILITY_NAMES], axis=1)
    return _checked(column["label"], probabilities, {name: column[name] for name in STATISTIC_NAMES}, where=str(path))


def _checked(
    labels: np.ndarray, probabilities: np.ndarray, statistics: Mapping[str, np.ndarray], *, where: str
) -> Reference:
    """The arrays in their one form, or ModelInvalid."""
    n = len(labels)
    if n == 0:
        raise _invalid(f"{where} holds no prediction")
    if probabilities.shape != (n, NUM_CLASSES):
        raise _invalid(f"{where}: probabilities have shape {probabilities.shape}, expected {(n, NUM_CLASSES)}")
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise _invalid(f"{where}: labels are {labels.dtype} {labels.shape}, expected integers of shape {(n,)}")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise _invalid(f"{where}: labels span {labels.min()} to {labels.max()}, expected 0 to {NUM_CLASSES - 1}")
    # Written so that NaN fails it too.
    if not (np.all(probabilities >= 0) and np.all(np.abs(probabilities.sum(axis=1) - 1) <= _SUM_TOLERANCE)):
        raise _invalid(f"{where}: some rows are not probabilities (negative, NaN, or not summing to one)")
    kept = {}
    for name in STATISTIC_NAMES:
        values = statistics.get(name)
        if values is None or values.shape != (n,) or not np.all(np.isfinite(values)):
            raise _invalid(f"{where}: the image statistic {name} is not {n} finite numbers")
        kept[name] = values.astype(np.float32)
    return Reference(
        class_ids=probabilities.argmax(axis=1).astype(np.int64),
        probabilities=probabilities.astype(np.float32),
        statistics=kept,
        labels=labels.astype(np.int64),
    )


def _invalid(what: str) -> ModelInvalid:
    return ModelInvalid(
        f"Not a reference of predictions: {what}.",
        fix="register the model again (`cifar10 train`): its reference is written at registration.",
    )
