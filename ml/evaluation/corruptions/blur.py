"""Blur: defocus, glass, motion and zoom. Images are floats in 0..1 (n, h, w, 3)."""

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import sparse
from scipy.ndimage import convolve1d, correlate, gaussian_filter, zoom

from ml.evaluation.corruptions.draws import Draws

_DEFOCUS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # disk radius, width of its anti-aliasing
_GLASS = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))  # sigma in pixels, rounds of displacement by a pixel
_MOTION = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))  # radius and sigma in pixels
_ZOOM = (1.06, 1.11, 1.16, 1.21, 1.26)  # the zooms rise from 1 to just below, by 0.01


def defocus_blur(images: np.ndarray, level: int, _rng: np.random.Generator) -> np.ndarray:
    """Spreads each pixel over a disk, as a lens out of focus does."""
    kernel = _disk(*_DEFOCUS[level])
    return correlate(images, kernel[None, :, :, None], mode="mirror")


def _disk(radius: float, alias_blur: float) -> np.ndarray:
    """A filled disk, smoothed by a small Gaussian against its steps; its sum is 1."""
    reach = np.arange(-8, 9)
    disk = (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2).astype(np.float64)
    bell = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias_blur**2))
    bell /= bell.sum()
    for axis in (0, 1):
        disk = convolve1d(disk, bell, axis=axis, mode="mirror")
    disk = disk[5:12, 5:12]  # the widest reaches 1.5 + 1 pixels
    return disk / disk.sum()


def glass_blur(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Frosted glass: pixels stand a pixel away from their place, between two small Gaussian blurs.

    CIFAR-10-C walks from the last pixel to the first and means to swap each with its neighbour 0 or 1 up and 0 or 1 to
    the left. Its assignment goes through views of one array, so it copies that neighbour and swaps nothing; and since
    the walk has not been at that neighbour yet, all pixels can be taken from the picture before the walk at once. That
    is what is done here. The first two rows and columns stay, as theirs.
    """
    sigma, rounds = _GLASS[level]
    n, height, width, _ = images.shape
    blurred = gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")
    rows, columns = (axis[2:, 2:] for axis in np.mgrid[0:height, 0:width])
    for _ in range(rounds):
        shift = draws.integers(2, 2, height, width)[:, :, 2:, 2:]
        displaced = blurred.copy()
        displaced[:, 2:, 2:] = blurred[np.arange(n)[:, None, None], rows - shift[:, 0], columns - shift[:, 1]]
        blurred = displaced
    return gaussian_filter(blurred, (0, sigma, sigma, 0), mode="nearest")


def motion_blur(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Smears each image along a direction of its own, within 45 degrees of the horizontal."""
    return smear(images, *_MOTION[level], draws.uniform(-45, 45))


def smear(images: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """Averages each pixel with those on one side of it, weighted by half a bell, as ImageMagick's MotionBlurImage.

    The i-th of 2 radius + 1 pixels lies i steps along the angle, rounded to whole pixels; its weight falls as
    exp(-i² / 2 sigma²), and the weights add up to 1. Beyond the edge lies the edge's own colour.

    Args:
        images: float (n, h, w, channels).
        radius: of the bell, in pixels.
        sigma: of the bell, in pixels.
        degrees: (n,), the direction in which the pixels lie: 0 is to the right, 90 is down.

    Returns:
        float32 (n, h, w, channels).
    """
    n, height, width, channels = images.shape
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    weights = weights[weights > 1e-5]  # all others together weigh less than a hundredth of a grey level
    reach = len(weights) - 1
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    # Every shift of an image is a window on its padded self; a row of pixels and channels is one run of memory.
    windows = sliding_window_view(padded.reshape(n, height + 2 * reach, -1), (height, width * channels), axis=(1, 2))
    radians = np.deg2rad(degrees.astype(np.float64))
    smeared = np.zeros((n, height, width * channels), dtype=np.float32)
    for step, weight in enumerate(weights):
        down = reach + np.ceil(step * np.sin(radians) - 0.5).astype(np.int64)
        right = reach + np.ceil(step * np.cos(radians) - 0.5).astype(np.int64)
        smeared += np.float32(weight) * windows[np.arange(n), down, right * channels]
    return smeared.reshape(images.shape)


def zoom_blur(images: np.ndarray, level: int, _draws: Draws) -> np.ndarray:
    """Averages an image with itself zoomed in step by step, as a camera that races towards it."""
    n, height, width, channels = images.shape
    columns = images.transpose(1, 2, 0, 3).reshape(height * width, n * channels)
    zoomed = _zoom_mean(height, width, level) @ columns
    return zoomed.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


@lru_cache(maxsize=len(_ZOOM))
def _zoom_mean(height: int, width: int, level: int) -> sparse.csr_array:
    """The mean of all zooms and of the image as one linear map of its pixels: float32 (h w, h w), sparse.

    A sparse product adds up each column by itself, so that a result does not depend on how many images come together.
    """
    factors = np.arange(1, _ZOOM[level], 0.01)
    total = sparse.eye_array(height * width, format="csr")
    for factor in factors:
        total = total + sparse.kron(zoom_matrix(height, factor), zoom_matrix(width, factor), format="csr")
    return sparse.csr_array(total / (len(factors) + 1), dtype=np.float32)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Zooming into the middle of one axis, by linear interpolation, as a matrix.

    Args:
        size: pixels of the axis, kept.
        factor: >= 1.

    Returns:
        float64 (size, size); rows add up to 1.
    """
    crop = int(np.ceil(size / factor))
    top = (size - crop) // 2
    stretched = zoom(np.eye(crop), (factor, 1), order=1)
    trim = (len(stretched) - size) // 2
    matrix = np.zeros((size, size))
    matrix[:, top : top + crop] = stretched[trim : trim + size]
    return matrix
