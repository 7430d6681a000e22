"""How well a model holds under the corruptions of CIFAR-10-C: one accuracy per corruption and severity, and their mean.

Owns the grid, its seeds and the interval of the mean; what a corruption does to an image is `corruptions`'.
"""

import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ml.datasets.labels import NUM_CLASSES
from ml.errors import InputInvalid
from ml.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ml.evaluation.metrics import wilson_interval
from ml.evaluation.significance import student_interval

logger = logging.getLogger(__name__)

CORRUPTION_SEED = 0
"""The same for every model: they are compared on the same corrupted images."""
_LOG_EVERY_S = 5.0

Predict = Callable[[np.ndarray], np.ndarray]
"""uint8 (n, 32, 32, 3) to float (n, 10)."""


@dataclass(frozen=True, slots=True)
class Robustness:
    """What `robustness` found. Accuracies lie in 0..1."""

    n: int
    """Images per cell; every cell has the same ones."""
    mean_accuracy: float
    """Over all cells, unweighted."""
    mean_accuracy_low: float
    mean_accuracy_high: float
    """95 % interval of the mean: see `mean_interval`."""
    by_corruption: dict[str, float]
    """Mean over the severities."""
    cells: dict[tuple[str, int], float]
    """By corruption and severity."""
    accuracy_per_image: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    """float (n,): the share of the cells in which an image is right. The images stand in an order of their own, the
    same for every model measured on them. Empty where the figures were read back from a record, which has no images."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `cells` as {corruption: {severity as text: accuracy}}."""
        cells: dict[str, dict[str, float]] = {name: {} for name in self.by_corruption}
        for (name, severity), accuracy in self.cells.items():
            cells[name][str(severity)] = accuracy
        return {
            "n": self.n,
            "mean_accuracy": self.mean_accuracy,
            "mean_accuracy_low": self.mean_accuracy_low,
            "mean_accuracy_high": self.mean_accuracy_high,
            "by_corruption": dict(self.by_corruption),
            "cells": cells,
        }


def robustness(
    predict: Predict,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int,
) -> Robustness:
    """Measures a model on every corruption at every severity, on the same images.

    The order of the images does not matter: they are put into one of their own first, since what a corruption draws
    depends on the row. Nor does it matter which other cells are measured: each has a seed of its own. Logs progress
    about every five seconds. Holds one corrupted copy of the images at a time.

    Args:
        predict: uint8 (n, 32, 32, 3), all images of a cell at once, to finite floats (n, 10); the largest of a row is
            the prediction, the first of equals.
        images: uint8 (n, 32, 32, 3), n >= 1.
        labels: int (n,), 0..9.
        corruptions: one or more of CORRUPTIONS, each once.
        severities: one or more of SEVERITIES, each once.
        seed: >= 0; the same seed gives the same corrupted images.

    Raises:
        InputInvalid: images, labels, corruptions, severities, seed or what `predict` returns are not as said.
    """
    _check(images, labels, corruptions, severities, seed)
    order = sorted(range(len(images)), key=lambda row: (images[row].tobytes(), int(labels[row])))
    images, labels = images[order], labels[order]
    grid = [(name, severity) for name in corruptions for severity in severities]
    cells: dict[tuple[str, int], float] = {}
    hits_per_image = np.zeros(len(images), dtype=np.int64)
    began = logged = time.monotonic()
    for name, severity in grid:
        hits = _predicted(predict, corrupt(images, name, severity, _cell_seed(seed, name, severity))) == labels
        hits_per_image += hits
        cells[name, severity] = float(hits.mean())
        now = time.monotonic()
        if now - logged >= _LOG_EVERY_S:
            logged, per_cell = now, (now - began) / len(cells)
            logger.info(
                "Robustness: %d of %d cells, %.0f images/s, %.0f s left",
                len(cells), len(grid), len(images) / per_cell, per_cell * (len(grid) - len(cells)),
            )  # fmt: skip
    accuracy_per_image = hits_per_image / len(grid)
    low, high = mean_interval(accuracy_per_image)
    found = Robustness(
        n=len(images),
        mean_accuracy=int(hits_per_image.sum()) / (len(images) * len(grid)),
        mean_accuracy_low=low,
        mean_accuracy_high=high,
        by_corruption={
            name: math.fsum(cells[name, severity] for severity in severities) / len(severities) for name in corruptions
        },
        cells=cells,
        accuracy_per_image=accuracy_per_image,
    )
    logger.info(
        "Robustness: mean accuracy %.4f (95 %% interval %.4f to %.4f) over %d cells of %d images, in %.0f s",
        found.mean_accuracy, low, high, len(grid), len(images), time.monotonic() - began,
    )  # fmt: skip
    return found


def mean_interval(accuracy_per_image: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean accuracy over all cells, for other images of the same kind.

    An image that is hard in one cell is hard in others, so cells are not independent and images are: with m_i the share
    of the cells in which image i is right, the interval is Student's of their mean, mean ± t(0.975, n - 1) s / √n with
    s the standard deviation of the m_i (divisor n - 1), cut to 0..1. The corruptions count as given, not as a sample;
    what they draw is part of m_i. Images drawn by strata make it a little too wide, never too narrow.

    Where all m_i are equal, or there is one only, s says nothing: then it is Wilson's for n trials, which is too wide.

    Args:
        accuracy_per_image: float (n,), 0..1, n >= 1.

    Raises:
        InputInvalid: there is none.
    """
    n = len(accuracy_per_image)
    if n == 0:
        raise InputInvalid("A mean of no images has no interval.", fix="give one image or more.")
    mean = float(accuracy_per_image.mean())
    if np.ptp(accuracy_per_image) == 0:
        return wilson_interval(round(mean * n), n)
    low, high = student_interval(accuracy_per_image)
    return max(0.0, low), min(1.0, high)


def _cell_seed(seed: int, name: str, severity: int) -> int:
    """A cell's draws are its own: with one seed for all, the severities of a noise would share one pattern."""
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()), severity)).generate_state(1)[0])


def _predicted(predict: Predict, images: np.ndarray) -> np.ndarray:
    scores = np.asarray(predict(images))
    if scores.shape != (len(images), NUM_CLASSES) or not np.isfinite(scores).all():
        raise InputInvalid(
            f"The model's answer has shape {scores.shape}, or values that are not finite.",
            fix=f"predict must return finite floats of shape ({len(images)}, {NUM_CLASSES}).",
        )
    return scores.argmax(axis=1)


def _check(
    images: np.ndarray, labels: np.ndarray, corruptions: Sequence[str], severities: Sequence[int], seed: int
) -> None:
    """All before the first cell, so that nothing is refused after minutes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
        raise InputInvalid(f"Images are {images.dtype} {images.shape}.", fix="give uint8 of shape (n, 32, 32, 3).")
    whole = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),)
    if not whole or labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise InputInvalid(
            f"Labels are {labels.dtype} {labels.shape} for {len(images)} images, or not of the ten classes.",
            fix=f"give one integer of 0..{NUM_CLASSES - 1} for each image.",
        )
    for kind, given, known in (("corruptions", corruptions, CORRUPTIONS), ("severities", severities, SEVERITIES)):
        if not given or len(set(given)) < len(given) or not set(given) <= set(known):
            raise InputInvalid(f"The {kind} are {list(given)}.", fix=f"give one or more of {list(known)}, each once.")
    if seed < 0:
        raise InputInvalid(f"The seed is {seed}.", fix="give a whole number of 0 or more.")
