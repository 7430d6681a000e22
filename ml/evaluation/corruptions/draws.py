"""Random numbers that belong to one image each."""

from functools import cached_property

import numpy as np


class Draws:
    """One generator per image, made of the seed and of the image's row in the whole batch.

    So what an image gets does not depend on how a batch is cut, nor on how much its neighbours draw (Poisson and normal
    numbers take more or fewer bits by their value). Each method draws from every image's generator in turn.
    """

    def __init__(self, seed: int, rows: range) -> None:
        self._seed = seed
        self._rows = rows

    @cached_property
    def _generators(self) -> list[np.random.Generator]:
        # Made on first use: 20 µs each, and some corruptions draw nothing.
        return [np.random.default_rng((self._seed, row)) for row in self._rows]

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """float32 (n, *shape) from low to high."""
        drawn = np.empty((len(self._rows), int(np.prod(shape))), dtype=np.float32)
        for generator, row in zip(self._generators, drawn, strict=True):
            generator.random(out=row, dtype=np.float32)
        return (low + (high - low) * drawn).reshape(-1, *shape)

    def normal(self, mean: float, deviation: float, *shape: int) -> np.ndarray:
        """float32 (n, *shape)."""
        drawn = np.empty((len(self._rows), int(np.prod(shape))), dtype=np.float32)
        for generator, row in zip(self._generators, drawn, strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        return (mean + deviation * drawn).reshape(-1, *shape)

    def poisson(self, means: np.ndarray) -> np.ndarray:
        """float32 of the shape of `means` (n, ...), whose values are >= 0."""
        drawn = np.empty(means.shape, dtype=np.float32)
        for generator, row, mean in zip(self._generators, drawn, means, strict=True):
            row[...] = generator.poisson(mean)
        return drawn

    def integers(self, below: int, *shape: int) -> np.ndarray:
        """int64 (n, *shape) from 0 to below - 1."""
        return np.stack([generator.integers(below, size=shape) for generator in self._generators])
