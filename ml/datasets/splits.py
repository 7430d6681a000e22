"""Which image belongs to which split: pure functions of the images' content.

The source's test part stays the test split, so that figures compare with published ones. Train and validation are
told apart by each image's own hash: an image never changes sides when others come or go, and copies of one image
cannot stand on both sides.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ml.datasets.labels import NUM_CLASSES

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True, eq=False)
class Partition:
    """Rows of the source's train part by destination (int64 indices, ascending), and how many were dropped why."""

    train: np.ndarray
    validation: np.ndarray
    duplicates: int
    overlaps: int
    conflicts: int


def content_ids(images: np.ndarray) -> list[str]:
    """sha256 of each image's bytes (row, column, channel), as 64 hex digits. `images`: uint8 (n, 32, 32, 3)."""
    return [hashlib.sha256(image).hexdigest() for image in np.ascontiguousarray(images)]


def is_validation(content_id: str, fraction: float = VALIDATION_FRACTION) -> bool:
    """Whether the image with this hash is for validation: hashes are uniform, so `fraction` of all images are."""
    return int(content_id[:16], 16) < fraction * 2**64


def partition(train_ids: Sequence[str], train_labels: np.ndarray, test_ids: Sequence[str]) -> Partition:
    """Assigns the rows of the source's train part.

    Dropped are: every copy of an image that stands under two labels (conflicts), images that also stand in test
    (overlaps), and all but the first copy of an image (duplicates).
    """
    labels_of: dict[str, set[int]] = defaultdict(set)
    for content_id, label in zip(train_ids, train_labels.tolist(), strict=True):
        labels_of[content_id].add(label)
    in_test = set(test_ids)
    seen: set[str] = set()
    rows: dict[bool, list[int]] = {False: [], True: []}
    duplicates = overlaps = conflicts = 0
    for row, content_id in enumerate(train_ids):
        if content_id in in_test:
            overlaps += 1
        elif len(labels_of[content_id]) > 1:
            conflicts += 1
        elif content_id in seen:
            duplicates += 1
        else:
            seen.add(content_id)
            rows[is_validation(content_id)].append(row)
    return Partition(
        train=np.array(rows[False], dtype=np.int64),
        validation=np.array(rows[True], dtype=np.int64),
        duplicates=duplicates,
        overlaps=overlaps,
        conflicts=conflicts,
    )


def stratified_rows(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Picks `limit` rows that keep the classes' proportions: int64 indices, ascending.

    Each class gets its share rounded down; what is left goes to the largest remainders (Hamilton's method).

    Args:
        labels: int (n,), 0-9.
        limit: 0 to n.
        seed: of the choice within each class.
    """
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    quota = counts * (limit / max(len(labels), 1))
    take = np.floor(quota).astype(np.int64)
    by_remainder = np.argsort(-(quota - take), kind="stable")
    take[by_remainder[: limit - int(take.sum())]] += 1
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == index))[: take[index]] for index in range(NUM_CLASSES)]
    return np.sort(np.concatenate(chosen))
