"""Accuracy on parts of the images: where a model that is good on the whole is not."""

from dataclasses import dataclass

import numpy as np

from ml.errors import InputInvalid
from ml.evaluation.metrics import wilson_interval

_PARTS = ("lowest third", "middle third", "highest third")


@dataclass(frozen=True, slots=True)
class Slice:
    """The images of one third, by a property of theirs, and how many of them are right."""

    name: str
    """Property and third."""
    least: float
    most: float
    """The property's range in this third; 0..1 for brightness, 0..0.5 for contrast."""
    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95 % interval."""


def by_brightness_and_contrast(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> tuple[Slice, ...]:
    """Thirds of the images by brightness (mean of all values of an image) and by contrast (their standard deviation).

    Both on a scale of values in 0..1. Equals are told apart by their place, so that the thirds differ by one image at
    most; a third without an image is left out.

    Args:
        images: uint8 (n, 32, 32, 3), n >= 1.
        labels: int (n,), 0..9.
        probabilities: float (n, 10), for these images in this order.

    Raises:
        InputInvalid: the three differ in length, or there is no image.
    """
    if not len(images) == len(labels) == len(probabilities) > 0:
        raise InputInvalid(
            f"{len(images)} images, {len(labels)} labels and {len(probabilities)} predictions cannot be sliced.",
            fix="give one label and one prediction for each image, and one image or more.",
        )
    right = probabilities.argmax(axis=1) == labels
    flat = images.reshape(len(images), -1)
    # One image at a time in double precision: a float copy of the whole test split would take 240 MB.
    properties = {
        "brightness": np.array([image.mean() for image in flat]) / 255,
        "contrast": np.array([image.std() for image in flat]) / 255,
    }
    found = []
    for name, values in properties.items():
        thirds = np.array_split(values.argsort(kind="stable"), len(_PARTS))
        found += [
            _slice(f"{name}, {part}", values[rows], right[rows])
            for part, rows in zip(_PARTS, thirds, strict=True)
            if len(rows)
        ]
    return tuple(found)


def _slice(name: str, values: np.ndarray, right: np.ndarray) -> Slice:
    n, hits = len(right), int(right.sum())
    return Slice(name, float(values.min()), float(values.max()), n, hits / n, *wilson_interval(hits, n))
