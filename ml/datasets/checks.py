"""Whether images and labels make a dataset that a model may be trained on: pure functions of arrays.

Each check returns what is wrong in words; `check` gathers them, so that one run names every fault.
Duplicates are no fault: `splits` drops and counts them.
"""

from collections.abc import Iterator

import numpy as np

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.datasets.raw import RawDataset
from ml.errors import DatasetInvalid

BALANCE_TOLERANCE = 0.2
"""How far a class may lie from its even share, as a part of that share. CIFAR-10 itself is exactly even."""


def check(raw: RawDataset, tolerance: float = BALANCE_TOLERANCE) -> None:
    """Holds both parts of the source to the form that everything after this relies on.

    Raises:
        DatasetInvalid: lists every fault that was found.
    """
    faults = [
        f"{part}: {fault}"
        for part, images, labels in (
            ("train", raw.train_images, raw.train_labels),
            ("test", raw.test_images, raw.test_labels),
        )
        for fault in faults_of(images, labels, tolerance)
    ]
    if faults:
        raise DatasetInvalid(
            f"The data from {raw.source} cannot be used. {'; '.join(faults)}.",
            fix="correct the source, or set CIFAR10_SOURCE to an unaltered copy of CIFAR-10; nothing was stored.",
        )


def faults_of(images: np.ndarray, labels: np.ndarray, tolerance: float = BALANCE_TOLERANCE) -> list[str]:
    """All faults of one part. Expects uint8 (n, 32, 32, 3) with values over 0-255, and integers (n,) of 0-9."""
    form = list(_form_faults(images, labels))
    # Values of arrays of the wrong form mean nothing.
    return form or [*_pixel_faults(images), *_label_faults(labels, tolerance)]


def _form_faults(images: np.ndarray, labels: np.ndarray) -> Iterator[str]:
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        yield f"images have shape {images.shape}, expected (n, {', '.join(map(str, IMAGE_SHAPE))})"
    if images.dtype != np.uint8:
        yield f"images are {images.dtype}, expected uint8"
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        yield f"labels are {labels.dtype} of shape {labels.shape}, expected integers of shape (n,)"
    if len(images) != len(labels):
        yield f"{len(images)} images but {len(labels)} labels"
    if len(images) == 0:
        yield "there are no images"


def _pixel_faults(images: np.ndarray) -> Iterator[str]:
    low, high = int(images.min()), int(images.max())
    if high <= 1:
        yield f"pixels lie in {low}-{high}, expected 0-255 (they seem to be scaled to 0-1)"
    elif high - low < 64:
        yield f"pixels lie in {low}-{high}, expected them to spread over 0-255"


def _label_faults(labels: np.ndarray, tolerance: float) -> Iterator[str]:
    outside = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if len(outside):
        yield (
            f"{len(outside)} labels lie outside 0-{NUM_CLASSES - 1}, the first is {labels[outside[0]]} "
            f"at image {outside[0]}"
        )
        return
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    share = len(labels) / NUM_CLASSES
    uneven = np.flatnonzero(np.abs(counts - share) > tolerance * share)
    if len(uneven):
        found = ", ".join(f"class {index} has {counts[index]}" for index in uneven)
        yield f"classes are unbalanced: {found}; expected {share:.0f} +- {tolerance:.0%} each"
