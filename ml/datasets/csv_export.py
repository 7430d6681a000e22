"""A stored dataset as CSV, for tools that read nothing else: `datasets/<id>/csv/{train,validation,test}.csv.gz`.

Columns: label (0-9), label_name, pixel_0 ... pixel_3071. Pixels are in the order of the Parquet files: the value of row
r, column c and channel k (0 red, 1 green, 2 blue) is pixel_{(r * 32 + c) * 3 + k}, so that
`frame.filter(like="pixel_").to_numpy("uint8").reshape(-1, 32, 32, 3)` gives the images back. Rows are in the order of
the Parquet files.

60,000 rows are 660 MB of text: they are made and compressed piece by piece, so the export holds some 30 MB at a time
(on S3, which takes a file in one request, a split's file besides: 180 MB).
"""

import logging
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
from isal import igzip
from pydantic import BaseModel, ConfigDict

from ml.datasets.labels import CLASS_NAMES, IMAGE_BYTES
from ml.datasets.manifest import Split
from ml.datasets.splits import SPLIT_NAMES, SplitName
from ml.datasets.storage import MARKER, FolderWriter, Storage
from ml.datasets.store import DATASETS, iter_batches, open_split, read_manifest

logger = logging.getLogger(__name__)

HEADER = ("label", "label_name", *(f"pixel_{index}" for index in range(IMAGE_BYTES)))
_ROWS_AT_ONCE = 1000
_PROGRESS_SECONDS = 5.0
_LEVEL = 1
"""isal's: 60,000 rows in 4 s and 240 MB; level 0 is 4 % faster and 10 % larger, level 2 takes 2.7 times as long."""


class CsvManifest(BaseModel):
    """The commit marker of an export. `rows`: per split. `files`: {split: name within the folder}."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset_id: str
    rows: dict[SplitName, int]
    files: dict[SplitName, str]


def write_csv(data_url: str, dataset_id: str) -> tuple[CsvManifest, bool]:
    """Exports all splits of a stored dataset, unless that was done already.

    Returns:
        What the export holds, and whether this call wrote it.

    Raises:
        DatasetNotFound, DatasetInvalid: as `store.open_split` does.
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    storage = Storage(data_url)
    target = csv_folder(dataset_id)
    written = storage.read(f"{target}/{MARKER}")
    if written is not None:
        logger.info("%s is exported already; nothing written", dataset_id)
        return CsvManifest.model_validate_json(written), False
    read_manifest(data_url, dataset_id)  # an unknown id is refused before a folder is made for it
    with storage.commit(target) as folder:
        rows = {split: _export_split(folder, data_url, dataset_id, split) for split in SPLIT_NAMES}
        manifest = CsvManifest(
            dataset_id=dataset_id, rows=rows, files={split: _file_name(split) for split in SPLIT_NAMES}
        )
        with folder.open(MARKER) as file:
            file.write(manifest.model_dump_json(indent=2).encode())
    return manifest, True


def csv_folder(dataset_id: str) -> str:
    """Where the export lies under the data URL."""
    return f"{DATASETS}/{dataset_id}/csv"


def _file_name(split: SplitName) -> str:
    return f"{split}.csv.gz"


def _export_split(folder: FolderWriter, data_url: str, dataset_id: str, split: SplitName) -> int:
    began = told = time.monotonic()
    done = 0
    with (
        open_split(data_url, dataset_id, split) as parquet,
        folder.open(_file_name(split)) as raw,
        _compressed(raw) as out,
    ):
        total = parquet.metadata.num_rows
        out.write(f"{','.join(HEADER)}\n".encode())
        for batch in iter_batches(parquet, _ROWS_AT_ONCE):
            for line in csv_lines(batch):
                out.write(line)
            done += len(batch.ids)
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                left = (total - done) * (now - began) / done
                logger.info("Exporting %s: %d of %d rows, %.0f s left", split, done, total, left)
    logger.info("Exported %s: %d rows in %.1f s", split, done, time.monotonic() - began)
    return done


def _compressed(raw: IO[bytes]) -> igzip.IGzipFile:
    # No time and no name in the header: the same dataset gives the same bytes.
    return igzip.IGzipFile(filename="", fileobj=raw, mode="wb", compresslevel=_LEVEL, mtime=0)


def _cell_table() -> np.ndarray:
    """The text of each pixel value with its comma, padded with NUL to four bytes: uint32 (256,)."""
    return np.array([f",{value}".encode() for value in range(256)], dtype="S4").view("<u4")


_CELLS = _cell_table()
_PREFIXES = tuple(f"{index},{name}".encode() for index, name in enumerate(CLASS_NAMES))


def csv_lines(batch: Split) -> Iterator[bytes]:
    """The rows of a batch as CSV text, a line each with its newline, without the header."""
    # One table lookup writes all cells of all rows; deleting the padding makes the text. Formatting number by number
    # takes 20 times as long.
    cells = _CELLS[batch.images.reshape(len(batch.labels), -1)]
    for label, row in zip(batch.labels.tolist(), cells, strict=True):
        yield _PREFIXES[label] + row.tobytes().translate(None, b"\0") + b"\n"
