"""Registers tiny versions in a real MLflow, for tests of what uses the registry. No TensorFlow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ml.datasets.manifest import Manifest
from ml.datasets.store import write_dataset
from ml.datasets.synthetic import generate
from ml.evaluation.golden import Golden, write_golden
from ml.registry import tracking
from ml.registry.packaging import Int8Files, register
from ml.registry.versions import MODEL_NAME, ModelVersion, Registry
from ml.settings import Settings
from tests.tiny_models import make_onnx

STAND_IN = Golden(np.zeros((10, 32, 32, 3), np.uint8), np.arange(10), np.eye(10, dtype=np.float32))
"""Stands for golden images: no tiny model answers so."""


@dataclass(frozen=True)
class Files:
    """Stands for ml.training.export.ExportedModel."""

    keras: Path
    onnx: Path


def small_dataset(settings: Settings, *, train: int = 200, test: int = 200, seed: int = 0) -> Manifest:
    """A stored SYNTHETIC dataset of a few hundred images."""
    return write_dataset(generate(train=train, test=test, seed=seed), settings.data_url)


def register_tiny(
    settings: Settings,
    manifest: Manifest,
    work: Path,
    *,
    model: Mapping[str, object] | None = None,
    files: Files | None = None,
    golden: Golden | None = None,
    int8: Int8Files | str = "a tiny model has none",
    card: str | None = None,
    validation_accuracy: float = 0.5,
    architecture: str = "baseline",
    run_id: str | None = None,
) -> ModelVersion:
    """One more version: `model` are keyword arguments of `make_onnx`, `run_id` the run to go on with, if any.

    `files` are those of a real model, and `golden` its golden images; without them, both but stand for some.
    """
    work.mkdir(parents=True, exist_ok=True)
    if files is None:
        files = Files(work / "trained.keras", make_onnx(work / "trained.onnx", **(model or {})))  # type: ignore[arg-type]
        files.keras.write_bytes(b"stands for a Keras file")
    reference = work / "reference.parquet"
    reference.write_bytes(b"stands for a reference")
    with tracking.run(settings, f"tiny-{architecture}", run_id=run_id) as run:
        return register(
            run,
            exported=files,
            metrics={"validation_accuracy": validation_accuracy, "validation_loss": 1.0},
            recipe={"name": "tiny", "seed": 1},
            manifest=manifest,
            weights="RANDOM WEIGHTS",
            reference=reference,
            golden=write_golden(work / "golden.npz", golden or STAND_IN),
            int8=int8,
            card=card or f"# A tiny model on {manifest.data} data\n",
            input_example=np.zeros((2, 32, 32, 3), dtype=np.uint8),
            data=manifest.data,
            architecture=architecture,
        )


def int8_files(work: Path, model: Mapping[str, object], *, golden: Golden | None = None) -> Int8Files:
    """Stands for an int8 form: a model of `make_onnx`, so that a test knows what it says."""
    work.mkdir(parents=True, exist_ok=True)
    reference = work / "int8.parquet"
    reference.write_bytes(b"stands for the int8 form's reference")
    onnx = make_onnx(work / "int8.onnx", **model)  # type: ignore[arg-type]
    return Int8Files(onnx, reference, write_golden(work / "int8.npz", golden or STAND_IN))


def take_alias(registry: Registry, alias: str) -> None:
    """Takes `alias` away, as somebody may by hand."""
    MlflowClient(registry.tracking_uri, registry.tracking_uri).delete_registered_model_alias(registry.name, alias)


def empty_registry(tracking_uri: str) -> None:
    """Deletes the registered model, so that a test begins with none. Its version numbers start again at 1."""
    try:
        MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri).delete_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
