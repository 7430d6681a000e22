"""Batches for Keras out of arrays in memory. Images stay uint8 until the model, so 45,000 of them are 138 MB."""

import math
from collections.abc import Callable

import keras
import numpy as np

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Batches(keras.utils.PyDataset):  # type: ignore[misc]  # keras is untyped
    """Shuffled (or ordered) batches of inputs and labels.

    The order and the augmentation of epoch e are functions of (seed, e, batch) alone, never of timing.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        """inputs (n, ...) and labels int (n,) are only read. `seed` None keeps their order; `augment` needs a seed."""
        super().__init__()  # one worker: Keras reads in this process, prefetching on a thread
        if len(inputs) != len(labels):
            raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels")
        self._inputs, self._labels, self._batch_size = inputs, labels, batch_size
        self._seed, self._augment, self._epoch = seed, augment, 0
        self._order = self._new_order()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, a last smaller one included."""
        return math.ceil(len(self._labels) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        inputs = self._inputs[chosen]
        if self._augment is not None:
            inputs = self._augment(inputs, np.random.default_rng([self._seed or 0, self._epoch, index]))
        return inputs, self._labels[chosen]

    def on_epoch_end(self) -> None:
        """Keras calls it when an epoch's batches are used up."""
        self._epoch += 1
        self._order = self._new_order()

    def _new_order(self) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self._labels))
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._labels))
