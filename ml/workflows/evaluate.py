"""Evaluation: one registered version on its dataset's test split, clean and under the corruptions of CIFAR-10-C.

Judges nothing and moves no alias: that is the gate's. What it finds is attached to the version.
"""

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ml.datasets.manifest import Manifest
from ml.datasets.store import read_manifest
from ml.errors import ModelNotFound
from ml.evaluation.gate_policy import load_policy
from ml.evaluation.measurement import Measurement
from ml.registry.connection import patiently
from ml.registry.versions import CHAMPION, ModelVersion, Registry
from ml.settings import Settings
from ml.workflows.exam import load_exam, measure_version

logger = logging.getLogger(__name__)

FOLDER, FULL, SAMPLE = "evaluation", "full.json", "sample.json"
"""Where the result is attached: `full.json` holds all test images in every cell, `sample.json` fewer."""


def evaluate(
    settings: Settings,
    *,
    version: int | None = None,
    alias: str = CHAMPION,
    full: bool = False,
    limit: int | None = None,
    dataset_id: str | None = None,
) -> dict[str, object]:
    """Measures one version and attaches what was found to it, under `evaluation/`.

    Args:
        settings: where registry and datasets are, and the gate's policy.
        version: its number; None: the version that bears `alias`.
        alias: `champion`, `challenger` or `previous`.
        full: all test images in each of the 75 corrupted cells, instead of as many as the gate's policy says.
        limit: at most so many test images, clean and in each cell (a seeded, stratified choice); None: all.
        dataset_id: whose test split; None: the dataset that the version was trained on.

    Returns:
        {"version", "architecture", "engine" (the form that was measured: the one that serves), "dataset_id", "data",
        "n", "accuracy", "accuracy_low", "accuracy_high", "loss",
        "precision", "recall", "f1" (macro means), "calibration_error", "calibration_low", "calibration_high",
        "corrupted": as `ml.evaluation.robustness.Robustness.as_dict`, "seconds"}. Intervals are of 95 %.

    Raises:
        ModelNotFound: there is no such version, or no version bears this alias.
        ModelInvalid: its files are not a model that can be used.
        ConfigurationError: `limit` is not positive, or the policy cannot be used.
        DatasetNotFound, DatasetInvalid, StorageError: the test images cannot be read.
        RegistryUnavailable: MLflow could not be asked.
    """
    began = time.monotonic()
    per_cell = None if full else load_policy(settings.gate_policy).absolute.corrupted_images
    registry = Registry(settings.tracking_uri)
    chosen = registry.by_version(version) if version is not None else _bearer(registry, alias)
    manifest = read_manifest(settings.data_url, dataset_id or chosen.dataset_id)
    if manifest.dataset_id != chosen.dataset_id:
        logger.warning(
            "Version %d was trained on %s: its training images may be among these test images",
            *(chosen.version, chosen.dataset_id),
        )
    measured = measure_version(registry, settings, chosen, load_exam(settings, manifest.dataset_id, limit, per_cell))
    found = _result(chosen, manifest, measured)
    found["seconds"] = round(time.monotonic() - began, 1)
    _attach(registry, chosen, found, FULL if full and limit is None else SAMPLE)
    return found


def _bearer(registry: Registry, alias: str) -> ModelVersion:
    found = registry.by_alias(alias)
    if found is None:
        raise ModelNotFound(
            f"No version of {registry.name} bears the alias {alias}.",
            fix="name a version with --version; `cifar10 promote` makes a champion, `cifar10 train` a challenger.",
        )
    return found


def _result(version: ModelVersion, manifest: Manifest, measured: Measurement) -> dict[str, object]:
    clean, corrupted = measured.metrics, measured.robustness
    return {
        "version": version.version,
        "architecture": version.architecture,
        "engine": version.form.engine,
        "dataset_id": manifest.dataset_id,
        "data": manifest.data,
        "n": clean.n,
        "accuracy": clean.accuracy,
        "accuracy_low": clean.accuracy_low,
        "accuracy_high": clean.accuracy_high,
        "loss": clean.loss,
        "precision": clean.precision,
        "recall": clean.recall,
        "f1": clean.f1,
        "calibration_error": clean.calibration_error,
        "calibration_low": measured.calibration_low,
        "calibration_high": measured.calibration_high,
        "corrupted": None if corrupted is None else corrupted.as_dict(),
    }


def _attach(registry: Registry, version: ModelVersion, found: Mapping[str, object], name: str) -> None:
    # Patiently: of all test images it is the work of half an hour.
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        (Path(folder) / name).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
        patiently(lambda: registry.attach(version, Path(folder), FOLDER), what="Attaching the evaluation")
    logger.info("Attached %s/%s to version %d", FOLDER, name, version.version)
