"""What a stored dataset looks like, in numbers: pure functions of its images and labels.

Drawing is `explore_plots`' business, the page is `explore_page`'s. Reads split by split in pieces, so that 60,000
images are looked at in some 100 MB.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.datasets.manifest import Manifest, Split
from ml.datasets.splits import SPLIT_NAMES, SplitName
from ml.datasets.store import iter_batches, open_split, read_manifest

logger = logging.getLogger(__name__)

CHANNELS = ("red", "green", "blue")
PREVIEWS_PER_CLASS = 12


@dataclass(frozen=True, eq=False)
class SplitStatistics:
    """Sums over one split, from which every statistic shown follows.

    class_counts: int64 (10,). channel_histogram: int64 (3, 256), pixels by channel and value.
    class_sums: float64 (10, 32, 32, 3), the sum of each class's images.
    """

    class_counts: np.ndarray
    channel_histogram: np.ndarray
    class_sums: np.ndarray

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.class_counts.sum())

    @property
    def channel_mean(self) -> np.ndarray:
        """Mean pixel value of each channel, 0-255: float64 (3,). Exact: it comes from the histogram."""
        return self.channel_histogram @ np.arange(256) / self.channel_histogram.sum(axis=1)

    @property
    def channel_std(self) -> np.ndarray:
        """Standard deviation (of the population) of each channel's pixels, 0-255: float64 (3,)."""
        mean_square = self.channel_histogram @ np.arange(256) ** 2 / self.channel_histogram.sum(axis=1)
        return np.sqrt(mean_square - self.channel_mean**2)

    @property
    def mean_images(self) -> np.ndarray:
        """The mean image of each class: uint8 (10, 32, 32, 3); black for a class without images."""
        counts = np.maximum(self.class_counts, 1)[:, None, None, None]
        return np.rint(self.class_sums / counts).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Exploration:
    """All that the plots and the page show. previews: per class uint8 (k, 32, 32, 3), the first of the train split."""

    manifest: Manifest
    statistics: dict[SplitName, SplitStatistics]
    previews: tuple[np.ndarray, ...]


def summarise(batches: Iterable[Split]) -> SplitStatistics:
    """Adds up a split that comes in pieces."""
    counts = np.zeros(NUM_CLASSES, dtype=np.int64)
    histogram = np.zeros((3, 256), dtype=np.int64)
    sums = np.zeros((NUM_CLASSES, int(np.prod(IMAGE_SHAPE))), dtype=np.float64)
    for batch in batches:
        counts += np.bincount(batch.labels, minlength=NUM_CLASSES)
        for channel in range(3):
            histogram[channel] += np.bincount(batch.images[..., channel].ravel(), minlength=256)
        # One matrix product sums all classes at once; float32 is exact here, as no sum of a piece reaches 2^24.
        members = (batch.labels == np.arange(NUM_CLASSES)[:, None]).astype(np.float32)
        sums += members @ batch.images.reshape(len(batch.labels), -1).astype(np.float32)
    return SplitStatistics(counts, histogram, sums.reshape(NUM_CLASSES, *IMAGE_SHAPE))


def explore_dataset(data_url: str, dataset_id: str) -> Exploration:
    """Looks at all splits of a stored dataset.

    Raises:
        DatasetNotFound, DatasetInvalid, StorageError: as `store.open_split` does.
    """
    manifest = read_manifest(data_url, dataset_id)
    statistics: dict[SplitName, SplitStatistics] = {}
    for split in SPLIT_NAMES:
        logger.info("Exploring %s: %d images", split, manifest.counts[split])
        with open_split(data_url, dataset_id, split) as file:
            statistics[split] = summarise(iter_batches(file))
    with open_split(data_url, dataset_id, "train") as file:
        previews = first_of_each_class(iter_batches(file))
    return Exploration(manifest, statistics, previews)


def first_of_each_class(batches: Iterable[Split], count: int = PREVIEWS_PER_CLASS) -> tuple[np.ndarray, ...]:
    """The first `count` images of each class, fewer where there are not as many: ten uint8 (k, 32, 32, 3)."""
    found: list[list[np.ndarray]] = [[] for _ in range(NUM_CLASSES)]
    for batch in batches:
        for label, images in enumerate(found):
            rows = np.flatnonzero(batch.labels == label)[: count - len(images)]
            images.extend(batch.images[rows])
        if all(len(images) == count for images in found):
            break
    return tuple(np.array(images, dtype=np.uint8).reshape(-1, *IMAGE_SHAPE) for images in found)
