"""Batches for Keras: which images, in which order, changed how. A function of (seed, epoch, batch) alone.

What a batch is made of, the maker says: draws for `AugmentedImages`, which holds the images itself, or features of a
frozen prefix, read from where they are cached.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ml.training.augmentation import Draws, soft_labels

Make = Callable[[np.ndarray, int, int], Draws]
"""(index int (n,), epoch, batch) -> the network's inputs by name."""


class Batches(keras.utils.PyDataset):  # type: ignore[misc]  # keras is untyped
    """An epoch's batches, of inputs and labels. `epoch` says which, and is set before each.

    Labels are int64 (n,), or float32 (n, 10) where `soft`.
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, make: Make, *, seed: int | None = None, soft: bool = False
    ) -> None:
        """labels: int (m,). seed: of the order, another each epoch; None is the order of the labels."""
        super().__init__()  # one worker: where Keras reads this itself, it does so between the steps
        self.epoch = 0
        self._labels, self._batch_size, self._make = labels, batch_size, make
        self._seed, self._soft = seed, soft
        self._order: tuple[int, np.ndarray] = (-1, np.arange(len(labels)))

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, a last smaller one included."""
        return math.ceil(len(self._labels) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Draws, np.ndarray]:
        epoch = self.epoch
        chosen = self._epochs_order(epoch)[index * self._batch_size : (index + 1) * self._batch_size]
        inputs = self._make(chosen, epoch, index)
        labels = self._labels[chosen]
        return inputs, soft_labels(labels, inputs) if self._soft else labels

    def _epochs_order(self, epoch: int) -> np.ndarray:
        if self._seed is not None and self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._labels)))
        return self._order[1]


def feed(batches: Batches) -> Any:
    """What `fit` reads these batches from.

    On TensorFlow Keras would wrap them in a tf.data pipeline with autotuning, and when an epoch's pipeline is taken
    down its destructor waits for the tuner, which sleeps in doubling steps from 10 ms to a minute: measured, an epoch
    whose last batch was done after 3.3 s ended after 5.2 s. So the pipeline is made here, without tuning.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf  # noqa: PLC0415  # only where it is the backend

    example = batches[0]
    structure = tf.nest.map_structure(lambda value: tf.TensorSpec((None, *value.shape[1:]), value.dtype), example)
    flat = tf.nest.flatten(structure)

    def make(index: Any) -> Any:
        # A map over numbers: a pipeline from a generator goes through Python three times a batch, and the step waits.
        values = tf.numpy_function(
            lambda i: tf.nest.flatten(batches[int(i)]), [index], [spec.dtype for spec in flat], stateful=True
        )
        for value, spec in zip(values, flat, strict=True):
            value.set_shape(spec.shape)
        return tf.nest.pack_sequence_as(structure, values)

    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.range(batches.num_batches).map(make).prefetch(2).with_options(options)
