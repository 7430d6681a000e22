"""Versioned datasets under `{data_url}/datasets/<id>/`: {train,validation,test}.parquet and manifest.json.

A dataset's id is a hash of its content, so writing the same data twice writes once, and an id never means anything
else later. Owns the Parquet layout; atomicity is `storage`'s, the split policy is `splits`', and what stands beside
the Parquet files (csv/, exploration/) is written by their own modules.

Columns: id (string, sha256 of the image), label (int8), image (fixed-size binary of 3072 bytes: row, column, channel).
Images are not compressed: zstd saves 2.5 % of 157 MB and costs a copy on every read.
"""

import hashlib
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from ml.datasets.checks import check
from ml.datasets.labels import CLASS_NAMES, IMAGE_BYTES, IMAGE_SHAPE, NUM_CLASSES
from ml.datasets.manifest import FORMAT_VERSION, Dropped, Manifest, Split
from ml.datasets.raw import RawDataset
from ml.datasets.splits import SPLIT_NAMES, SplitName, content_ids, partition, stratified_rows
from ml.datasets.storage import MARKER, Storage, refused
from ml.errors import ConfigurationError, DatasetInvalid, DatasetNotFound

logger = logging.getLogger(__name__)

DATASETS = "datasets"
ROWS_PER_GROUP = 5000
"""A row group has 15 MB: readers that stream hold one, and 50,000 rows still are only ten."""
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("image", pa.binary(IMAGE_BYTES), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Checked, split and named, not stored yet."""

    dataset_id: str
    raw: RawDataset
    splits: dict[SplitName, Split]
    dropped: Dropped


def prepare(raw: RawDataset) -> PreparedDataset:
    """Checks the data, assigns every image to a split and computes the dataset's id.

    Raises:
        DatasetInvalid: the data breaks a check.
    """
    check(raw)
    train_ids, test_ids = content_ids(raw.train_images), content_ids(raw.test_images)
    parts = partition(train_ids, raw.train_labels, test_ids)

    def train_part(rows: np.ndarray) -> Split:
        return Split(raw.train_images[rows], raw.train_labels[rows], tuple(train_ids[row] for row in rows))

    splits: dict[SplitName, Split] = {
        "train": train_part(parts.train),
        "validation": train_part(parts.validation),
        "test": Split(raw.test_images, raw.test_labels, tuple(test_ids)),
    }
    empty = [name for name in SPLIT_NAMES if not splits[name].ids]
    if empty:
        raise DatasetInvalid(
            f"{raw.source} leaves no image for the split(s) {', '.join(empty)}.", fix="use a source with more images."
        )
    dropped = Dropped(duplicates=parts.duplicates, overlaps=parts.overlaps, conflicts=parts.conflicts)
    logger.info(
        "Checked %d images; dropped %d duplicates, %d that also stand in test, %d with two labels",
        len(train_ids) + len(test_ids), parts.duplicates, parts.overlaps, parts.conflicts,
    )  # fmt: skip
    return PreparedDataset(_content_id(raw.data, splits), raw, splits, dropped)


def commit(prepared: PreparedDataset, data_url: str) -> tuple[Manifest, bool]:
    """Stores a prepared dataset unless it is stored already.

    Returns:
        The stored manifest, and whether this call wrote it.

    Raises:
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    storage = Storage(data_url)
    target = f"{DATASETS}/{prepared.dataset_id}"
    if storage.committed(target):
        logger.info("Dataset %s is stored already; nothing written", prepared.dataset_id)
        return read_manifest(data_url, prepared.dataset_id), False
    began = time.monotonic()
    with storage.commit(target) as folder:
        checksums = {}
        for name, split in prepared.splits.items():
            logger.info("Writing %s: %d images", name, len(split.ids))
            with folder.open(f"{name}.parquet") as file:
                hashing = _HashingFile(file)
                _write_parquet(hashing, split)
            checksums[f"{name}.parquet"] = hashing.sha256.hexdigest()
        manifest = _describe(prepared, checksums)
        with folder.open(MARKER) as file:
            file.write(manifest.model_dump_json(indent=2).encode())
    logger.info("Stored dataset %s at %s in %.1f s", manifest.dataset_id, storage.url(target), time.monotonic() - began)
    return manifest, True


def write_dataset(raw: RawDataset, data_url: str) -> Manifest:
    """Checks, splits and stores: `prepare`, then `commit`. The same data gives the same id and is written once.

    Raises:
        DatasetInvalid: the data breaks a check; nothing is written.
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    return commit(prepare(raw), data_url)[0]


def read_manifest(data_url: str, dataset_id: str) -> Manifest:
    """The manifest of a stored dataset.

    Raises:
        DatasetNotFound: no dataset has this id.
        DatasetInvalid: the manifest was altered.
        StorageError: the store could not be asked.
    """
    storage = Storage(data_url)
    path = f"{DATASETS}/{dataset_id}/{MARKER}"
    content = storage.read(path)
    if content is None:
        raise DatasetNotFound(
            f"No dataset {dataset_id} lies under {storage.url(DATASETS)}.",
            fix="run `cifar10 ingest`, or name one of the ids in that folder.",
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DatasetInvalid(
            f"{storage.url(path)} is not a manifest of this version: {error.errors()[0]['msg']}.",
            fix="delete that dataset's folder and run `cifar10 ingest` again.",
        ) from error


def list_datasets(data_url: str) -> list[Manifest]:
    """All stored datasets, newest first; half-written ones are none.

    Raises:
        DatasetInvalid: a manifest was altered.
        StorageError: the store could not be asked.
    """
    names = Storage(data_url).committed_folders(DATASETS)
    return sorted((read_manifest(data_url, name) for name in names), key=lambda each: each.created_at, reverse=True)


def latest_dataset_id(data_url: str) -> str:
    """Id of the dataset that was stored last, for people who name none; tasks hand ids on instead.

    Raises:
        DatasetNotFound: there is none yet.
        StorageError: the store could not be asked.
    """
    stored = list_datasets(data_url)
    if not stored:
        raise DatasetNotFound(f"No dataset lies under {Storage(data_url).url(DATASETS)}.", fix="run `cifar10 ingest`.")
    return stored[0].dataset_id


def load_split(data_url: str, dataset_id: str, split: SplitName, limit: int | None = None, seed: int = 0) -> Split:
    """Reads a split into memory, after verifying the file against the manifest.

    Args:
        data_url: where datasets are kept.
        dataset_id: of a stored dataset.
        split: "train", "validation" or "test".
        limit: at most so many images, chosen by `seed` in the classes' proportions; None: all.
        seed: of that choice.

    Returns:
        The images in the order of the source.

    Raises:
        DatasetNotFound: no dataset has this id.
        DatasetInvalid: the file is missing or was altered since it was written.
        ConfigurationError: `limit` is not positive.
        StorageError: the store could not be read.
    """
    if limit is not None and limit < 1:
        raise ConfigurationError(f"A split of {limit} images was asked for.", fix="use a limit of 1 or more, or none.")
    with open_split(data_url, dataset_id, split) as file:
        labels = file.read(columns=["label"]).column("label").to_numpy().astype(np.int64)
        rows = None if limit is None or limit >= len(labels) else stratified_rows(labels, limit, seed)
        count = len(labels) if rows is None else len(rows)
        images = np.empty((count, *IMAGE_SHAPE), dtype=np.uint8)
        ids: list[str] = []
        start = 0
        for batch in iter_batches(file):
            stop = start + len(batch.labels)
            if rows is None:
                images[start:stop] = batch.images
                ids.extend(batch.ids)
            else:
                picked = rows[(rows >= start) & (rows < stop)] - start
                images[len(ids) : len(ids) + len(picked)] = batch.images[picked]
                ids.extend(batch.ids[row] for row in picked)
            start = stop
    chosen = labels if rows is None else labels[rows]
    images.flags.writeable = chosen.flags.writeable = False
    return Split(images, chosen, tuple(ids))


@contextmanager
def open_split(data_url: str, dataset_id: str, split: SplitName) -> Iterator[pq.ParquetFile]:
    """Opens a split's file for readers that stream it (with `iter_batches`), after verifying its checksum.

    Raises:
        DatasetNotFound, DatasetInvalid, StorageError: as for `load_split`.
    """
    manifest = read_manifest(data_url, dataset_id)
    storage = Storage(data_url)
    path = f"{DATASETS}/{dataset_id}/{split}.parquet"
    local = storage.local_path(path)
    # Local files are mapped, not read: verifying and parsing then share the page cache and cost no memory.
    try:
        with pa.memory_map(str(local)) if local else pa.BufferReader(_remote(storage, path)) as source:
            content = source.read_buffer()
            if hashlib.sha256(content).hexdigest() != manifest.checksums[f"{split}.parquet"]:
                raise _damaged(storage.url(path), "is not what was written")
            with pq.ParquetFile(pa.BufferReader(content)) as file:
                yield file
    except FileNotFoundError as error:
        raise _damaged(storage.url(path), "is missing") from error
    except OSError as error:
        raise refused(error, storage.url(path), "read") from error


def iter_batches(file: pq.ParquetFile, rows: int = ROWS_PER_GROUP) -> Iterator[Split]:
    """A split's file in pieces of at most `rows`; the images are views into Arrow's memory."""
    for batch in file.iter_batches(batch_size=rows):
        image = batch.column("image")
        held = np.frombuffer(image.buffers()[1], dtype=np.uint8)
        pixels = held[image.offset * IMAGE_BYTES :][: len(image) * IMAGE_BYTES]
        labels = batch.column("label").to_numpy(zero_copy_only=False).astype(np.int64)
        yield Split(pixels.reshape(-1, *IMAGE_SHAPE), labels, tuple(batch.column("id").to_pylist()))


def _remote(storage: Storage, path: str) -> bytes:
    content = storage.read(path)
    if content is None:
        raise FileNotFoundError(path)
    return content


def _damaged(url: str, how: str) -> DatasetInvalid:
    return DatasetInvalid(f"{url} {how}.", fix="delete that dataset's folder and run `cifar10 ingest` again.")


def _content_id(data: str, splits: dict[SplitName, Split]) -> str:
    """Hash over format, kind, split assignment, labels and images (through their own hashes), in order."""
    digest = hashlib.sha256(f"format {FORMAT_VERSION} {data}\n".encode())
    for name in SPLIT_NAMES:
        digest.update(f"{name} {len(splits[name].ids)}\n".encode())
        digest.update("".join(splits[name].ids).encode())
        digest.update(splits[name].labels.astype("<i8").tobytes())
    return f"ds-{digest.hexdigest()[:12]}"


def _describe(prepared: PreparedDataset, checksums: dict[str, str]) -> Manifest:
    def histogram(labels: np.ndarray) -> dict[str, int]:
        return dict(zip(CLASS_NAMES, np.bincount(labels, minlength=NUM_CLASSES).tolist(), strict=True))

    return Manifest(
        dataset_id=prepared.dataset_id,
        format_version=FORMAT_VERSION,
        data=prepared.raw.data,
        source=prepared.raw.source,
        created_at=datetime.now(UTC),
        counts={name: len(split.ids) for name, split in prepared.splits.items()},
        class_histogram={name: histogram(split.labels) for name, split in prepared.splits.items()},
        dropped=prepared.dropped,
        checksums=checksums,
        source_checksums=prepared.raw.source_checksums,
    )


def _write_parquet(file: "_HashingFile", split: Split) -> None:
    with pq.ParquetWriter(
        pa.PythonFile(file, mode="w"), _SCHEMA, compression="none", use_dictionary=["label"], write_statistics=["label"]
    ) as writer:
        for start in range(0, len(split.ids), ROWS_PER_GROUP):
            rows = slice(start, start + ROWS_PER_GROUP)
            pixels = np.ascontiguousarray(split.images[rows])
            image = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(IMAGE_BYTES), len(pixels), [None, pa.py_buffer(pixels)]
            )
            columns = [pa.array(split.ids[rows]), pa.array(split.labels[rows].astype(np.int8)), image]
            writer.write_table(pa.table(columns, schema=_SCHEMA))


class _HashingFile(io.RawIOBase):
    """Passes bytes on and hashes them on the way, so that the checksum costs no second read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        self.sha256.update(content)
        return self._file.write(content)
