"""What becomes of pictures in computers: contrast, elastic transform, pixelate, JPEG. Floats in 0..1 (n, h, w, 3)."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from ml.evaluation.corruptions.draws import Draws

_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
# In pixels: size of the displacement, sigma of its smoothness, and how far the affine map's three points are moved.
_ELASTIC = ((0.0, 0.0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96))
_PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # of the side
_JPEG = (80, 65, 58, 50, 40)  # quality


def contrast(images: np.ndarray, level: int, _rng: np.random.Generator) -> np.ndarray:
    """Shrinks each channel around its mean."""
    means = images.mean(axis=(1, 2), keepdims=True)
    return (images - means) * _CONTRAST[level] + means


def elastic_transform(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Pulls three points of an image a little apart, an affine map, and then every pixel by a smooth random field.

    Both steps interpolate bilinearly; the first mirrors beyond the edge's pixel, the second with it.
    """
    size, smoothness, reach = _ELASTIC[level]
    n, height, width, _ = images.shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    middle, third = np.array([width // 2, height // 2]), min(height, width) // 3
    points = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    # The map goes from the moved points back to the points: it says where in the image a pixel comes from.
    moved = np.concatenate([points + draws.uniform(-reach, reach, 3, 2), np.ones((n, 3, 1))], axis=-1)
    back = np.linalg.solve(moved, np.broadcast_to(points, (n, 3, 2))).astype(np.float32)[:, :, :, None, None]
    x, y = (back[:, 0, axis] * columns + back[:, 1, axis] * rows + back[:, 2, axis] for axis in (0, 1))
    images = _sampled(images, y, x, edge_twice=False)
    if size == 0:
        return images
    down, right = (
        gaussian_filter1d(np.eye(side), smoothness, axis=0, mode="reflect", truncate=3).astype(np.float32)
        for side in (height, width)
    )
    field = size * (down @ draws.uniform(-1, 1, 2, height, width) @ right.T)
    return _sampled(images, rows + field[:, 0], columns + field[:, 1], edge_twice=True)


def _sampled(images: np.ndarray, y: np.ndarray, x: np.ndarray, *, edge_twice: bool) -> np.ndarray:
    """The images at fractional places, bilinearly.

    Args:
        images: float32 (n, h, w, 3).
        y: float32 (n, h, w), in pixels, of any size: beyond the edge the image is mirrored, again and again.
        x: likewise.
        edge_twice: whether the mirror repeats the edge's pixel (SciPy's "reflect") or not (its "mirror").
    """
    n, height, width, channels = images.shape
    pixels = images.reshape(-1, channels)
    first = (np.arange(n) * height * width)[:, None, None]
    top, left = np.floor(y), np.floor(x)
    below, beside = (y - top)[..., None], (x - left)[..., None]
    row, column = top.astype(np.int64), left.astype(np.int64)
    rows = [first + width * _mirrored(row + step, height, edge_twice) for step in (0, 1)]
    columns = [_mirrored(column + step, width, edge_twice) for step in (0, 1)]
    upper, lower = (
        (1 - beside) * pixels.take(line + columns[0], axis=0) + beside * pixels.take(line + columns[1], axis=0)
        for line in rows
    )
    return (1 - below) * upper + below * lower


def _mirrored(index: np.ndarray, size: int, edge_twice: bool) -> np.ndarray:
    if edge_twice:
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    if size == 1:
        return np.zeros_like(index)
    index = index % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)


def pixelate(images: np.ndarray, level: int, _draws: Draws) -> np.ndarray:
    """Makes an image smaller and then as large as it was, both times by the means of boxes."""
    _, height, width, _ = images.shape
    small = (max(1, int(width * _PIXELATE[level])), max(1, int(height * _PIXELATE[level])))
    box = Image.Resampling.BOX
    return _through_pillow(images, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(images: np.ndarray, level: int, _draws: Draws) -> np.ndarray:
    """Stores an image as JPEG, with colours at half the resolution, and reads it again."""

    def stored_and_read(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG[level])
        return Image.open(file)

    return _through_pillow(images, stored_and_read)


def _through_pillow(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    as_bytes = np.rint(images * 255).astype(np.uint8)
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in as_bytes])
    return changed.astype(np.float32) / 255
