"""Corruptions of images with known severity, to see what a model and a monitor do when the world changes.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
with the parameters of CIFAR-10-C (github.com/hendrycks/robustness, make_cifar_c.py). Own code, in NumPy and SciPy,
over whole batches; the random draws differ from theirs, the parameters do not.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import convolve1d, correlate

from ml.errors import InputInvalid

Floats = np.ndarray
_Corruption = Callable[[Floats, int, np.random.Generator], Floats]

SEVERITIES = (1, 2, 3, 4, 5)
_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_DEFOCUS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # disk radius, width of its anti-aliasing
_FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # amount, decay of the fractal's wobble


def corrupt(images: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupted copies: uint8 of the same shape.

    Args:
        images: uint8 (n, h, w, 3).
        name: one of CORRUPTIONS.
        severity: 1 (slight) to 5.
        seed: the same seed gives the same result.

    Raises:
        InputInvalid: an unknown corruption or severity, or images of another kind.
    """
    if name not in CORRUPTIONS:
        raise InputInvalid(f"There is no corruption {name!r}.", fix=f"use one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise InputInvalid(f"Severity {severity!r} is not one of 1 to 5.", fix="use 1 (slight) to 5.")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputInvalid(f"Images are {images.dtype} {images.shape}.", fix="give uint8 of shape (n, h, w, 3).")
    if len(images) == 0:
        return images.copy()
    corrupted = _BY_NAME[name](images / 255.0, severity - 1, np.random.default_rng(seed))
    return np.rint(np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(images: Floats, level: int, rng: np.random.Generator) -> Floats:
    return images + rng.normal(scale=_NOISE[level], size=images.shape)


def _brightness(images: Floats, level: int, _rng: np.random.Generator) -> Floats:
    """Raises V of HSV: all three channels by the ratio of the new V to the old, so that hue and saturation stay."""
    value = images.max(axis=-1, keepdims=True)
    raised = np.clip(value + _BRIGHTNESS[level], 0, 1)
    # A black pixel has no hue: it becomes grey.
    return np.where(value > 0, images * (raised / np.where(value > 0, value, 1)), raised)


def _contrast(images: Floats, level: int, _rng: np.random.Generator) -> Floats:
    means = images.mean(axis=(1, 2), keepdims=True)
    return (images - means) * _CONTRAST[level] + means


def _defocus_blur(images: Floats, level: int, _rng: np.random.Generator) -> Floats:
    kernel = _disk(*_DEFOCUS[level])
    return correlate(images, kernel[None, :, :, None], mode="mirror")


def _disk(radius: float, alias_blur: float) -> Floats:
    """A filled disk, smoothed by a small Gaussian against its steps; its sum is 1."""
    reach = np.arange(-8, 9)
    disk = (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2).astype(np.float64)
    bell = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias_blur**2))
    bell /= bell.sum()
    for axis in (0, 1):
        disk = convolve1d(disk, bell, axis=axis, mode="mirror")
    disk = disk[5:12, 5:12]  # the widest reaches 1.5 + 1 pixels
    return disk / disk.sum()


def _fog(images: Floats, level: int, rng: np.random.Generator) -> Floats:
    """Adds a plasma fractal per image and scales back to the image's own maximum, so that fog veils and greys."""
    amount, decay = _FOG[level]
    n, height, width, _ = images.shape
    side = 1 << (max(height, width) - 1).bit_length()
    veil = _plasma(n, side, decay, rng)[:, :height, :width, None]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    return (images + amount * veil) * brightest / (brightest + amount)


def _plasma(n: int, side: int, decay: float, rng: np.random.Generator) -> Floats:
    """n fractal maps (n, side, side) in 0..1, by the diamond-square algorithm on a torus (Fournier et al. 1982)."""
    maps = np.zeros((n, side, side))
    step, wobble = side, 100.0

    def around(mean: Floats) -> Floats:
        return mean + wobble * rng.uniform(-wobble, wobble, size=mean.shape)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        # Square step: the middle of each square, from its four corners.
        square = corners + np.roll(corners, -1, axis=1)
        square = square + np.roll(square, -1, axis=2)
        centres = around(square / 4)
        maps[:, half::step, half::step] = centres
        # Diamond step: the middle of each edge, from the two corners and the two centres beside it.
        maps[:, half::step, ::step] = around(
            (corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=2)) / 4
        )
        maps[:, ::step, half::step] = around(
            (corners + np.roll(corners, -1, axis=2) + centres + np.roll(centres, 1, axis=1)) / 4
        )
        step, wobble = half, wobble / decay
    maps -= maps.min(axis=(1, 2), keepdims=True)
    highest = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(highest > 0, highest, 1)


_BY_NAME: dict[str, _Corruption] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "defocus_blur": _defocus_blur,
    "fog": _fog,
    "gaussian_noise": _gaussian_noise,
}
CORRUPTIONS: tuple[str, ...] = tuple(_BY_NAME)
