"""The exam that every version sits, whoever asks: a dataset's test images, clean and under corruption.

Everything is measured through ONNX Runtime, from the registry's own file.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml.datasets.manifest import Split
from ml.datasets.store import load_split
from ml.evaluation.measurement import Measurement, measure
from ml.evaluation.robustness import CORRUPTION_SEED, robustness
from ml.registry.versions import Form, ModelVersion, Registry
from ml.serving.engine import Engine
from ml.settings import Settings

logger = logging.getLogger(__name__)

_CHUNK = 1000
"""Images between two progress lines at most."""


@dataclass(frozen=True)
class Exam:
    """The images that all are measured on."""

    clean: Split
    few: Split
    """Those that are corrupted, in each of the 75 ways."""


def load_exam(settings: Settings, dataset_id: str, limit: int | None, per_cell: int | None) -> Exam:
    """The test images of a dataset, each part a seeded, stratified choice.

    Args:
        settings: where datasets are.
        dataset_id: which one.
        limit: at most so many images in all; None: all of them.
        per_cell: at most so many of them under each corruption; None: all of those.

    Raises:
        DatasetNotFound, DatasetInvalid, StorageError: they cannot be read.
        ConfigurationError: `limit` is not positive.
    """
    logger.info("Loading the test images of %s", dataset_id)
    clean = load_split(settings.data_url, dataset_id, "test", limit)
    if per_cell is None or per_cell >= len(clean.labels):
        return Exam(clean, clean)
    return Exam(clean, load_split(settings.data_url, dataset_id, "test", per_cell))


def fetch_onnx(registry: Registry, settings: Settings, version: ModelVersion, form: Form) -> Path:
    """Path of the ONNX file of one of a version's forms.

    Raises:
        ModelInvalid, ModelNotFound: the version has no such file, or another one.
        RegistryUnavailable, StorageError: could not ask; says nothing of the version.
    """
    return registry.fetch(version, settings.cache_dir, files=(form.onnx,)) / "artifacts" / form.onnx


def answers(engine: Engine, version: ModelVersion, form: Form, exam: Exam) -> np.ndarray:
    """What one form of a version says of the clean test images: float32 (n, 10).

    Raises:
        ModelInvalid: it fails on these images.
    """
    n = len(exam.clean.labels)
    parts = []
    for start in range(0, n, _CHUNK):
        logger.info(
            *("Version %d (%s, %s): %d of %d test images", version.version, version.architecture),
            *(form.engine, start, n),
        )
        parts.append(engine.predict(exam.clean.images[start : start + _CHUNK]))
    return np.concatenate(parts)


def measure_version(
    registry: Registry,
    settings: Settings,
    version: ModelVersion,
    exam: Exam,
    *,
    form: Form | None = None,
    known: np.ndarray | None = None,
) -> Measurement:
    """Fetches the ONNX file of one of a version's forms and measures it.

    Args:
        registry: where the file is.
        settings: where fetched files are kept.
        version: which one.
        exam: the images.
        form: which form; None: the one in which it serves.
        known: its `answers`, where they are at hand.

    Raises:
        ModelInvalid, ModelNotFound: its file is not a model that can be used.
        InputInvalid: what it answers are no probabilities.
        RegistryUnavailable, StorageError: could not ask; says nothing of the version.
    """
    chosen = form or version.form
    engine = Engine(fetch_onnx(registry, settings, version, chosen))
    said = answers(engine, version, chosen, exam) if known is None else known
    corrupted = robustness(engine.predict, exam.few.images, exam.few.labels, seed=CORRUPTION_SEED)
    found = measure(exam.clean.labels, said, corrupted)
    logger.info(
        "Version %d (%s): test accuracy %.4f on %d images",
        *(version.version, chosen.engine, found.metrics.accuracy, found.metrics.n),
    )
    return found
