"""The generated stand-in for CIFAR-10: for machines that cannot have the real one, and for tests.

Ten shapes and textures on noisy backgrounds, 32x32 RGB. It is made to be learnable and not easy: a small CNN gets well
above chance in a minute, and never everything right. No figure measured on it says anything about CIFAR-10,
so everything made from it is labelled SYNTHETIC.
"""

import logging
from collections.abc import Callable

import numpy as np

from ml.datasets.labels import IMAGE_SIDE, NUM_CLASSES
from ml.datasets.raw import RawDataset

logger = logging.getLogger(__name__)

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of (x, y), each (n, 32, 32) in units of the shape's size: a signed field, above 0 inside the shape."""


def _stripes(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.minimum(0.6 * np.sin(4.2 * along), 1.3 - np.maximum(np.abs(along), np.abs(across)))


_SHAPES: tuple[Field, ...] = (
    lambda x, y: np.maximum(np.minimum(0.3 - np.abs(x), 1.1 - np.abs(y)), np.minimum(0.3 - np.abs(y), 1.1 - np.abs(x))),
    lambda x, y: np.minimum(1.1 - np.abs(x), 0.55 - np.abs(y)),
    lambda x, y: np.minimum(0.8 - y, 0.5 * y + 0.5 - np.abs(x)),
    lambda x, y: 0.9 - np.hypot(x, y),
    _stripes,
    lambda x, y: 0.28 - np.abs(np.hypot(x, y) - 0.75),
    lambda x, y: np.minimum(0.6 * np.sin(4.2 * x) * np.sin(4.2 * y), 1.3 - np.maximum(np.abs(x), np.abs(y))),
    lambda x, y: _stripes(y, x),
    lambda x, y: np.minimum(1.0 - np.hypot(x, y), y + 0.1),
    lambda x, y: np.maximum(
        np.minimum(0.42 - np.abs(x + 0.55), 0.9 - np.abs(y)), np.minimum(0.85 - np.abs(x), 0.35 - np.abs(y - 0.5))
    ),
)
"""One per class id: cross, bar, triangle, disc, upright stripes, ring, checks, level stripes, half disc, L."""


def generate(train: int = 6000, test: int = 1000, seed: int = 0) -> RawDataset:
    """Generates a balanced set; the same arguments always give the same bytes.

    Args:
        train: number of training images, at least 10.
        test: number of test images, at least 10.
        seed: of the whole set; train and test differ within it.

    Returns:
        Images uint8 (n, 32, 32, 3); labels int64 (n,), each class n/10 times (rounded).
    """
    logger.info("Generating %d + %d SYNTHETIC images (seed %d)", train, test, seed)
    train_stream, test_stream = np.random.SeedSequence(seed).spawn(2)
    train_images, train_labels = _draw(train, np.random.default_rng(train_stream))
    test_images, test_labels = _draw(test, np.random.default_rng(test_stream))
    return RawDataset(
        data="SYNTHETIC",
        source=f"synthetic (train={train}, test={test}, seed={seed})",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        source_checksums={},
    )


def _draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.permutation(np.arange(count, dtype=np.int64) % NUM_CLASSES)
    mask = _masks(labels, rng)[..., None]
    ground, figure = _colours(labels, rng)
    image = ground * (1 - mask) + figure * mask
    image += _shading(count, rng)[..., None]
    # Sensor noise, of a strength that differs between images as it does between cameras.
    strength = rng.uniform(6, 28, (count, 1, 1, 1)).astype(np.float32)
    image += strength * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def _masks(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel the shape covers: float32 (n, 32, 32), 0-1."""

    def each(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(labels), 1, 1)).astype(np.float32)

    grid = (np.arange(IMAGE_SIDE, dtype=np.float32) - (IMAGE_SIDE - 1) / 2)[None]
    size, angle = each(6, 13), each(-0.4, 0.4)
    x, y = (grid[:, None, :] - each(-5, 5)) / size, (grid[:, :, None] - each(-5, 5)) / size
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    field = np.empty((len(labels), IMAGE_SIDE, IMAGE_SIDE), dtype=np.float32)
    for class_id, shape in enumerate(_SHAPES):
        chosen = labels == class_id
        field[chosen] = shape(u[chosen], v[chosen])
    # One pixel wide edges, whatever the size.
    return np.clip(field * size + 0.5, 0, 1)


def _colours(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Background and shape colours: float32 (n, 1, 1, 3). A shape's hue leans to its class, and overlaps others'."""
    count = len(labels)
    hue = 2 * np.pi * (labels / NUM_CLASSES + rng.normal(0, 0.13, count))
    lean = np.stack([np.cos(hue - shift) for shift in (0, 2 * np.pi / 3, 4 * np.pi / 3)], axis=1)
    ground = rng.uniform(50, 205, (count, 1)) + rng.normal(0, 22, (count, 3))
    # Some figures hardly stand out: they keep the accuracy below 1.
    contrast = rng.uniform(18, 95, (count, 1)) * rng.choice([-1, 1], (count, 1))
    figure = ground + contrast + 34 * lean
    return ground.astype(np.float32)[:, None, None], figure.astype(np.float32)[:, None, None]


def _shading(count: int, rng: np.random.Generator) -> np.ndarray:
    """A soft light across the image and blotches over it: float32 (n, 32, 32), around 0."""
    ramp = np.linspace(-1, 1, IMAGE_SIDE, dtype=np.float32)
    tilt = rng.normal(0, 16, (2, count, 1, 1)).astype(np.float32)
    blotches = rng.normal(0, 14, (count, 8, 8)).astype(np.float32).repeat(4, axis=1).repeat(4, axis=2)
    return tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :] + blotches
