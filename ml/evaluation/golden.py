"""Golden images: one of each class that a model has right, with what it said of it. They are kept with the version, so
that whoever loads it later can see that it still answers as it did when it was registered.

Owns the choice and the file's format. Predicting is others'.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml.datasets.labels import CLASS_NAMES, IMAGE_SHAPE, NUM_CLASSES
from ml.errors import InputInvalid, ModelInvalid, StorageError
from ml.files import write_whole

_NAMES = ("images", "labels", "probabilities")


@dataclass(frozen=True, eq=False)
class Golden:
    """At most one image of each class, by class.

    images: uint8 (k, 32, 32, 3), RGB. labels: int64 (k,), 0..9. probabilities: float32 (k, 10), as the model gave them.
    """

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def missing(self) -> tuple[str, ...]:
        """The classes of which there is none."""
        return tuple(name for class_id, name in enumerate(CLASS_NAMES) if class_id not in self.labels)


def choose(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> Golden:
    """Of each class the image that is classified right with the most confidence, the first of equals.

    A class of which none is right is missing.

    Args:
        images: uint8 (n, 32, 32, 3), on which the model was not trained.
        labels: int (n,), 0..9.
        probabilities: float (n, 10), what the model gave for these images in this order.

    Raises:
        InputInvalid: the three do not belong together.
    """
    if images.shape != (len(labels), *IMAGE_SHAPE) or probabilities.shape != (len(labels), NUM_CLASSES):
        raise InputInvalid(
            f"Images {images.shape}, labels {labels.shape} and probabilities {probabilities.shape} do not fit.",
            fix=f"give n images (n, 32, 32, 3), n labels and probabilities (n, {NUM_CLASSES}).",
        )
    right = probabilities.argmax(axis=1) == labels
    rows = []
    for class_id in range(NUM_CLASSES):
        of_class = np.flatnonzero(right & (labels == class_id))
        if len(of_class):
            rows.append(of_class[probabilities[of_class, class_id].argmax()])
    chosen = np.array(rows, dtype=np.int64)
    return Golden(images[chosen], labels[chosen].astype(np.int64), probabilities[chosen].astype(np.float32))


def write_golden(path: Path, golden: Golden) -> Path:
    """Writes them to `path`, whole or not at all, and returns `path`.

    Raises:
        StorageError: the disk refuses.
    """
    content = io.BytesIO()
    np.savez_compressed(content, images=golden.images, labels=golden.labels, probabilities=golden.probabilities)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error}.", fix="make room there.") from error
    return path


def read_golden(path: Path) -> Golden:
    """Reads what `write_golden` wrote.

    Raises:
        ModelInvalid: it is no such file, or holds what a model cannot have given.
        StorageError: the disk refuses.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            golden = Golden(*(file[name] for name in _NAMES))
    except OSError as error:
        raise StorageError(f"{path} could not be read: {error}.", fix="see that the file may be read.") from error
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise _invalid(path, f"is no file of golden images ({type(error).__name__})") from error
    wrong = _what_is_wrong(golden)
    if wrong:
        raise _invalid(path, wrong)
    return golden


def _what_is_wrong(golden: Golden) -> str | None:
    images, labels, probabilities = golden.images, golden.labels, golden.probabilities
    k = len(labels) if labels.ndim == 1 else -1
    if images.shape != (k, *IMAGE_SHAPE) or probabilities.shape != (k, NUM_CLASSES):
        return f"holds images {images.shape}, labels {labels.shape} and probabilities {probabilities.shape}"
    if images.dtype != np.uint8 or labels.dtype != np.int64 or probabilities.dtype != np.float32:
        return f"holds images {images.dtype}, labels {labels.dtype} and probabilities {probabilities.dtype}"
    if not set(labels.tolist()) <= set(range(NUM_CLASSES)) or len(set(labels.tolist())) < k:
        return f"holds the labels {labels.tolist()}"
    if not np.isfinite(probabilities).all():
        return "holds probabilities that are not finite"
    return None


def _invalid(path: Path, what: str) -> ModelInvalid:
    return ModelInvalid(f"{path.name} {what}.", fix="train and register the model anew; registering writes this file.")
