"""Ingestion: from CIFAR10_SOURCE to a stored dataset, its CSV export and its exploration.

Three steps of their own, so that each is retried alone: the dataset is committed by the first, and the others add their
folder to it. Each is idempotent: run again with the same input, it writes nothing and returns the same.
"""

import logging

from ml.datasets import csv_export, store
from ml.datasets.cifar10 import load_cifar10
from ml.datasets.storage import Storage
from ml.settings import Settings

logger = logging.getLogger(__name__)


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
