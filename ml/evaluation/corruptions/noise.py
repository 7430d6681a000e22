"""Noise: Gaussian, shot and impulse. Images are floats in 0..1 (n, h, w, 3); what leaves that range is cut later."""

import numpy as np

from ml.evaluation.corruptions.draws import Draws

_GAUSSIAN = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
_SHOT = (500, 250, 100, 75, 50)  # photons of a white pixel
_IMPULSE = (0.01, 0.02, 0.03, 0.05, 0.07)  # share of the values


def gaussian_noise(images: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Adds a normal draw to every value of every channel, as electronics do in low light."""
    return images + rng.normal(scale=_GAUSSIAN[level], size=images.shape)


def shot_noise(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Counts photons: each value is a Poisson draw whose mean is the value, in units of a white pixel's photons."""
    photons = _SHOT[level]
    return draws.poisson(images * photons) / photons


def impulse_noise(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Salt and pepper: a share of the values, channel by channel, goes to 0 or to 1 with even chances."""
    share = _IMPULSE[level]
    lot = draws.uniform(0, 1, *images.shape[1:])
    return np.where(lot < share / 2, 0, np.where(lot < share, 1, images))
