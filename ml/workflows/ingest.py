"""Ingestion: from CIFAR10_SOURCE to a stored dataset, its CSV export and its exploration.

Three steps of their own, so that each is retried alone: the dataset is committed by the first, and the others add their
folder to it. Each is idempotent: run again with the same input, it writes no file and names the same ones. (An
exploration is logged to MLflow each time: a run there is the record of one execution.)
"""

import tempfile
from pathlib import Path

from ml.datasets import csv_export, explore_page, store
from ml.datasets.cifar10 import load_cifar10
from ml.datasets.storage import Storage
from ml.settings import Settings


def ingest(settings: Settings, source: str | None = None) -> dict[str, object]:
    """Resolves, verifies, checks, splits and stores the images.

    Args:
        settings: where from and where to.
        source: instead of the setting CIFAR10_SOURCE.

    Returns:
        {"dataset_id", "data", "source", "created": whether this run wrote it, "counts": {split: n}, "dropped", "url"}.

    Raises:
        SourceError: the source is not there, cannot be asked, or is corrupt.
        DatasetInvalid: the images break a check.
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    raw = load_cifar10(source or settings.cifar10_source, settings.cache_dir, settings.mlops_allow_stand_in)
    manifest, created = store.commit(store.prepare(raw), settings.data_url)
    return {
        "dataset_id": manifest.dataset_id,
        "data": manifest.data,
        "source": manifest.source,
        "created": created,
        "counts": dict(manifest.counts),
        "dropped": manifest.dropped.model_dump(),
        "url": Storage(settings.data_url).url(f"{store.DATASETS}/{manifest.dataset_id}"),
    }


def export_csv(settings: Settings, dataset_id: str) -> dict[str, object]:
    """Exports a stored dataset as gzipped CSV.

    Returns:
        {"dataset_id", "files": {split: url}, "rows": {split: n}, "created": whether this run wrote them}.

    Raises:
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    manifest, created = csv_export.write_csv(settings.data_url, dataset_id)
    storage, folder = Storage(settings.data_url), csv_export.csv_folder(dataset_id)
    return {
        "dataset_id": dataset_id,
        "files": {split: storage.url(f"{folder}/{name}") for split, name in manifest.files.items()},
        "rows": dict(manifest.rows),
        "created": created,
    }


def explore(settings: Settings, dataset_id: str) -> dict[str, object]:
    """Draws class distribution, channel statistics, previews and mean images; logs page and pictures to MLflow.

    Returns:
        {"dataset_id", "page": url of the HTML page, "run_id": of the MLflow run}.

    Raises:
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        StorageError: the disk or the store refused; nothing is left half-written.
        RegistryUnavailable: MLflow could not be asked; the page is kept, and running this again logs it.
    """
    # Only this step needs MLflow's client; ingest and export do not wait for its import.
    from ml.registry.tracking import log_exploration  # noqa: PLC0415

    manifest = store.read_manifest(settings.data_url, dataset_id)
    target, _ = explore_page.write_exploration(settings.data_url, dataset_id)
    with tempfile.TemporaryDirectory(prefix="exploration-") as folder:
        explore_page.copy_exploration(settings.data_url, dataset_id, Path(folder))
        params = {"data": manifest.data, "source": manifest.source, **{str(k): n for k, n in manifest.counts.items()}}
        run_id = log_exploration(settings, dataset_id, Path(folder), params)
    page = Storage(settings.data_url).url(f"{target}/{explore_page.PAGE}")
    return {"dataset_id": dataset_id, "page": page, "run_id": run_id}
