"""A labelled image set as a source yields it: before checks, splitting and storage, which are others' business."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

DataKind = Literal["cifar-10", "SYNTHETIC"]
"""The word that users, tags and the API's reply are shown: generated data always says so."""


@dataclass(frozen=True, eq=False)
class RawDataset:
    """Parsed, unchecked. Images are uint8 (n, 32, 32, 3), RGB, 0-255; labels int64 (n,), 0-9.

    `source_checksums` maps each source file to the md5 that was verified; empty where there is no file.
    """

    data: DataKind
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source_checksums: dict[str, str]
