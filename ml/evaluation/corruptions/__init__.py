"""Corruptions of images with known severity, to see what a model and a monitor do when the world changes.

The fifteen of Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", with the parameters of CIFAR-10-C (github.com/hendrycks/robustness, make_cifar_c.py). Own code, in
NumPy, SciPy and Pillow, over whole batches. What differs from theirs, and nothing else is meant to:

- the random draws;
- values are rounded at the end, where theirs are cut off, half a grey level darker on average;
- frost: the photographs are made, not taken (`weather`);
- interpolation and blur keep fractions of a level where OpenCV and ImageMagick round between two steps.

Owns the catalogue, the checks and the work in chunks; the formulas are `noise`'s, `blur`'s, `weather`'s, `digital`'s.
"""

from collections.abc import Callable

import numpy as np

from ml.errors import InputInvalid
from ml.evaluation.corruptions.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from ml.evaluation.corruptions.digital import contrast, elastic_transform, jpeg_compression, pixelate
from ml.evaluation.corruptions.draws import Draws
from ml.evaluation.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from ml.evaluation.corruptions.weather import brightness, fog, frost, snow

SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 500  # images at once: 6 MB per float32 copy, small enough to stay in a processor's cache for the most part

# These draw from one generator over the whole batch. Results with them are on record, so they stay bit for bit.
_WHOLE_BATCH: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "brightness": brightness,
    "contrast": contrast,
    "defocus_blur": defocus_blur,
    "fog": fog,
    "gaussian_noise": gaussian_noise,
}
# These have one generator per image, so that neither its neighbours nor the chunks change what becomes of an image.
_PER_IMAGE: dict[str, Callable[[np.ndarray, int, Draws], np.ndarray]] = {
    "elastic_transform": elastic_transform,
    "frost": frost,
    "glass_blur": glass_blur,
    "impulse_noise": impulse_noise,
    "jpeg_compression": jpeg_compression,
    "motion_blur": motion_blur,
    "pixelate": pixelate,
    "shot_noise": shot_noise,
    "snow": snow,
    "zoom_blur": zoom_blur,
}
CORRUPTIONS: tuple[str, ...] = tuple(sorted(_WHOLE_BATCH | _PER_IMAGE))
"""Names, in alphabetical order."""


def corrupt(images: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupted copies: uint8 of the same shape.

    What an image's corruption draws depends on the seed and on its row, so the first k of a batch come out as they
    would alone; equal images in two rows come out different, except under the corruptions that draw nothing. Fog alone
    draws by the size of the batch as well. Memory beyond the result is bounded, at some 100 MB, but for brightness,
    contrast, defocus_blur, fog and gaussian_noise, which hold float64 copies of the whole batch.

    Args:
        images: uint8 (n, h, w, 3). The parameters are meant for 32x32.
        name: one of CORRUPTIONS.
        severity: 1 (slight) to 5.
        seed: >= 0; the same seed gives the same result.

    Raises:
        InputInvalid: an unknown corruption or severity, a negative seed, or images of another kind.
    """
    if name not in CORRUPTIONS:
        raise InputInvalid(f"There is no corruption {name!r}.", fix=f"use one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise InputInvalid(f"Severity {severity!r} is not one of 1 to 5.", fix="use 1 (slight) to 5.")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputInvalid(f"Images are {images.dtype} {images.shape}.", fix="give uint8 of shape (n, h, w, 3).")
    if seed < 0:
        raise InputInvalid(f"The seed is {seed}.", fix="give a whole number of 0 or more.")
    if len(images) == 0:
        return images.copy()
    if name in _WHOLE_BATCH:
        return _as_bytes(_WHOLE_BATCH[name](images / 255.0, severity - 1, np.random.default_rng(seed)))
    corrupted = np.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        draws = Draws(seed, range(start, start + len(chunk)))
        floats = chunk.astype(np.float32) / 255
        corrupted[start : start + len(chunk)] = _as_bytes(_PER_IMAGE[name](floats, severity - 1, draws))
    return corrupted


def _as_bytes(images: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
