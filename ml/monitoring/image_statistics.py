"""Five numbers that say what an image looks like, so that a drift in the input can be seen and named.

Pure functions of the pixels. Where they are stored (`prediction_log`, the reference) and compared (`statistics`)
is elsewhere; both sides of a comparison must come from here.
"""

import numpy as np

STATISTIC_NAMES: tuple[str, ...] = ("brightness", "contrast", "sharpness", "saturation", "noise")

_CHUNK = 1024  # bounds the float copies to some 30 MB

# ITU-R Recommendation BT.601, section 2.5.1: luma of red, green and blue.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of each image.

    Let Y be the luma (BT.601) scaled to 0-1, and all convolutions be over the interior pixels.

    - brightness: mean of Y; 0-1.
    - contrast: standard deviation of Y (RMS contrast; Peli, "Contrast in complex images", 1990); 0-0.5.
    - sharpness: standard deviation of Y's 4-neighbour Laplacian (after Pech-Pacheco et al., "Diatom autofocusing in
      brightfield microscopy", 2000, who take the variance: the root keeps it in units of Y and on a float32's scale).
    - saturation: mean over pixels of (max - min) / max of R, G and B, 0 where black (Smith, "Color gamut transform
      pairs", 1978); 0-1.
    - noise: sigma of Y by Immerkaer, "Fast noise variance estimation", 1996: sqrt(pi/2) times the mean of |Y * M| / 6
      with M = [[1,-2,1],[-2,4,-2],[1,-2,1]], which is blind to flat areas and straight edges.

    Args:
        images: uint8 (n, height, width, 3) RGB, at least 3x3 pixels; n may be 0.

    Returns:
        float32 (n,) under each of `STATISTIC_NAMES`, in that order; all finite.

    Raises:
        ValueError: when shape or dtype is another; the callers are our own, so this is a programming error.
    """
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (n, >=3, >=3, 3), not {images.dtype} {images.shape}")
    table = np.empty((len(images), len(STATISTIC_NAMES)), np.float32)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        table[start : start + _CHUNK] = _statistics_of(part)
    return {name: table[:, column].copy() for column, name in enumerate(STATISTIC_NAMES)}


def _statistics_of(images: np.ndarray) -> np.ndarray:
    pixels = images.astype(np.float32) / np.float32(255)
    luma = pixels @ _LUMA
    # By hand: over an axis of three, numpy's own max and min take sixty times as long (84 of 100 us an image).
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    highest = np.maximum(np.maximum(red, green), blue)
    spread = highest - np.minimum(np.minimum(red, green), blue)
    saturation = np.divide(spread, highest, out=np.zeros_like(spread), where=highest > 0)

    middle = luma[:, 1:-1, 1:-1]
    above, below, left, right = luma[:, :-2, 1:-1], luma[:, 2:, 1:-1], luma[:, 1:-1, :-2], luma[:, 1:-1, 2:]
    cross = above + below + left + right
    corners = luma[:, :-2, :-2] + luma[:, :-2, 2:] + luma[:, 2:, :-2] + luma[:, 2:, 2:]
    laplacian = cross - 4 * middle
    immerkaer = corners - 2 * cross + 4 * middle

    over = (1, 2)
    # In double precision, so that the mean of one thousand pixels does not depend on how numpy blocks its sums.
    return np.stack(
        [
            luma.mean(axis=over, dtype=np.float64),
            luma.std(axis=over, dtype=np.float64),
            laplacian.std(axis=over, dtype=np.float64),
            saturation.mean(axis=over, dtype=np.float64),
            np.sqrt(np.pi / 2) / 6 * np.abs(immerkaer).mean(axis=over, dtype=np.float64),
        ],
        axis=1,
    )
