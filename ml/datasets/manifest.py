"""What is written beside a dataset's files, and what a split is once it is read: the types, without any storage."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from pydantic import BaseModel, ConfigDict

from ml.datasets.raw import DataKind
from ml.datasets.splits import SplitName

FORMAT_VERSION = 1
"""Part of every dataset id: a change of layout makes new datasets instead of half-readable ones."""


class Dropped(BaseModel):
    """How many images of the source's train part were left out, and why (see `splits.partition`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    duplicates: int
    overlaps: int
    conflicts: int = 0


class Manifest(BaseModel):
    """The commit marker of a dataset: a folder without one is no dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset_id: str
    format_version: int
    data: DataKind
    source: str
    created_at: datetime
    counts: dict[SplitName, int]
    class_histogram: dict[SplitName, dict[str, int]]
    """{split: {label name: images}}."""
    dropped: Dropped
    checksums: dict[str, str]
    """sha256 of each Parquet file."""
    source_checksums: dict[str, str]
    """md5 of each source file, as it was verified; empty for generated data."""


@dataclass(frozen=True, eq=False)
class Split:
    """One split in memory. Arrays are read-only.

    images: uint8 (n, 32, 32, 3), RGB, 0-255. labels: int64 (n,), 0-9. ids: n sha256 of the images, hex.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
