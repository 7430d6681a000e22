"""Augmentation in two halves: what is drawn, and what is done with it.

`draw` is NumPy and decides, from a random generator alone, what happens to each image of a batch: a few numbers per
image. `AugmentedImages` is a Keras layer that holds the training images on the device and makes the batch from those
numbers, so that on an accelerator no pixel crosses the bus, and every backend makes the same batch.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from ml.datasets.labels import NUM_CLASSES
from ml.training.recipe import Augmentation

Draws = dict[str, np.ndarray]
"""Per image of a batch: `index` int32 (n,) always; `flip` int32 (n,) 0 or 1; `shift` int32 (n, 2) rows and columns;
`hole` int32 (n, 2) centre of a cutout; `partner` int32 (n,) position in the batch of the image mixed in, `share`
float32 (n,) the first image's weight, and `box` int32 (n, 4) top, left, bottom, right of what is pasted, as far as
the augmentation asks for them."""

_GREY = 127.5


def draw(augmentation: Augmentation, index: np.ndarray, side: int, rng: np.random.Generator) -> Draws:
    """Decides what happens to the images of a batch.

    Args:
        augmentation: the recipe's.
        index: int (n,), which training images.
        side: of an image, in pixels.
        rng: where the choices come from; the same state gives the same draws.
    """
    n = len(index)
    draws: Draws = {"index": index.astype(np.int32)}
    if augmentation.flip:
        draws["flip"] = rng.integers(0, 2, n, dtype=np.int32)
    if augmentation.shift:
        draws["shift"] = rng.integers(-augmentation.shift, augmentation.shift + 1, (n, 2), dtype=np.int32)
    if augmentation.cutout:
        draws["hole"] = rng.integers(0, side, (n, 2), dtype=np.int32)
    if augmentation.mixes:
        draws |= _draw_mix(augmentation, n, side, rng)
    return draws


def _draw_mix(augmentation: Augmentation, n: int, side: int, rng: np.random.Generator) -> Draws:
    """One share for the batch, as in both papers' own code."""
    cut = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    share = rng.beta(alpha, alpha)
    partner = rng.permutation(n).astype(np.int32)
    box = np.zeros((n, 4), np.int32)
    if cut:
        half = int(side * np.sqrt(1 - share)) // 2
        centre = rng.integers(0, side, 2)
        low, high = np.clip(centre - half, 0, side), np.clip(centre + half, 0, side)
        box[:] = (*low, *high)
        share = 1 - float(np.prod(high - low)) / side**2  # the area that was really pasted counts
    return {"partner": partner, "share": np.full(n, share, np.float32), "box": box}


def neutral(example: Draws, index: np.ndarray) -> Draws:
    """Draws of the same kind as `example` that leave the images as they are. index: int (n,)."""
    n = len(index)
    draws = {key: np.zeros((n, *value.shape[1:]), value.dtype) for key, value in example.items()}
    draws["index"] = index.astype(np.int32)
    if "hole" in draws:
        draws["hole"] -= 1000  # far outside
    if "partner" in draws:
        draws["partner"] += np.arange(n, dtype=np.int32)
        draws["share"] += 1
    return draws


def soft_labels(labels: np.ndarray, draws: Draws) -> np.ndarray:
    """Labels int (n,) as float32 (n, 10): one-hot, or the mean of the two images' by their shares."""
    own = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    if "share" not in draws:
        return own
    share = draws["share"][:, None]
    return share * own + (1 - share) * own[draws["partner"]]


@keras.saving.register_keras_serializable(package="cifar10")
class AugmentedImages(layers.Layer):  # type: ignore[misc]  # keras is untyped
    """Training images that live where the training runs: draws -> float32 (n, side, side, 3), 0-255.

    A mirrored, shifted image is one gather of pixels: each output pixel knows which pixel of which image it is. What
    moves in at an edge is the image's own reflection (Lee et al. 2015 pad with zeros; reflection keeps the statistics).
    """

    def __init__(self, images: np.ndarray, cutout: int = 0, **options: Any) -> None:
        """images: uint8 (m, side, side, 3). cutout: side of the hole in pixels."""
        super().__init__(trainable=False, dtype="float32", **options)
        self._count, self._side = images.shape[:2]
        self._cutout = cutout
        self._pixels = self.add_weight(
            shape=(self._count * self._side**2, 3), dtype="uint8", trainable=False, initializer="zeros", name="pixels"
        )
        self._pixels.assign(images.reshape(-1, 3))
        self.built = True

    def call(self, draws: dict[str, Any]) -> Any:
        """draws: as `draw` makes them, as tensors."""
        line = np.arange(self._side, dtype=np.int32)
        rows, columns = line[None, :, None], line[None, None, :]
        if "flip" in draws:
            flip = draws["flip"][:, None, None]
            columns = flip * (self._side - 1 - columns) + (1 - flip) * columns
        if "shift" in draws:
            rows = self._reflect(rows + draws["shift"][:, 0, None, None])
            columns = self._reflect(columns + draws["shift"][:, 1, None, None])
        at = (draws["index"][:, None, None] * self._side + rows) * self._side + columns
        images = ops.cast(ops.take(self._pixels, at, axis=0), "float32")
        if "hole" in draws:
            low = draws["hole"] - self._cutout // 2
            images = ops.where(self._inside(low, low + self._cutout), _GREY, images)
        if "partner" in draws:
            images = self._mix(images, draws)
        return images

    def compute_output_shape(self, shapes: dict[str, tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """(n, side, side, 3)."""
        return (shapes["index"][0], self._side, self._side, 3)

    def _reflect(self, position: Any) -> Any:
        last = self._side - 1
        return last - ops.abs(last - ops.abs(position))

    def _inside(self, low: Any, high: Any) -> Any:
        """bool (n, side, side, 1): the pixels in low <= (row, column) < high; both int (n, 2)."""
        line = np.arange(self._side, dtype=np.int32)
        rows = (line >= low[:, :1]) & (line < high[:, :1])
        columns = (line >= low[:, 1:]) & (line < high[:, 1:])
        return (rows[:, :, None] & columns[:, None, :])[..., None]

    def _mix(self, images: Any, draws: dict[str, Any]) -> Any:
        """Pastes the box where there is one, blends by the share where there is none."""
        others = ops.take(images, draws["partner"], axis=0)
        low, high = draws["box"][:, :2], draws["box"][:, 2:]
        cut = ops.any(draws["box"] > 0, axis=1)[:, None, None, None]
        share = draws["share"][:, None, None, None]
        blended = share * images + (1 - share) * others
        return ops.where(cut, ops.where(self._inside(low, high), others, images), ops.where(cut, images, blended))
