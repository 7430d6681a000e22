"""One stage of a training: compile, fit, watch the validation set, keep the figures of every epoch."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import keras
import numpy as np

from ml.training.batches import Augment, Batches
from ml.training.progress import Progress, StopWhenDiverged
from ml.training.recipe import Recipe

logger = logging.getLogger(__name__)

OnEpoch = Callable[[str, int, Mapping[str, float]], None]
"""Called with the stage's name, the epoch (from 0) and its figures, while the training runs."""


@dataclass(frozen=True, slots=True)
class StageHistory:
    """What one stage did. `epochs` has loss, accuracy, val_loss and val_accuracy of each; `seconds` is of the fit."""

    name: str
    epochs: tuple[Mapping[str, float], ...]
    best_epoch: int
    """Index of the epoch of least validation loss."""
    trainable_parameters: int
    learning_rate: float
    seconds: float
    images: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """Inputs of a model (images uint8, or features float32) with their labels int (n,)."""

    inputs: np.ndarray
    labels: np.ndarray


def run_stage(
    model: keras.Model,
    name: str,
    recipe: Recipe,
    train: Labelled,
    validation: Labelled,
    *,
    epochs: int,
    learning_rate: float,
    augment: Augment | None = None,
    on_epoch: OnEpoch | None = None,
) -> StageHistory:
    """Trains what is trainable in `model`, in place.

    The loss is categorical cross-entropy in its sparse form: labels stay class ids, and the value is that of one-hot
    labels (-log of the true class's probability) without 45,000 x 10 floats.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
    """
    batches = Batches(train.inputs, train.labels, recipe.batch_size, seed=recipe.seed, augment=augment)
    rate: object = learning_rate
    if recipe.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps=epochs * batches.num_batches)
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # XLA's CPU convolutions are slower than oneDNN's, and it compiles for seconds
    )
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    logger.info(
        "%s: %d images, %d epochs of %d batches, %s trainable parameters",
        *(name, len(train.labels), epochs, batches.num_batches, f"{parameters:,}"),
    )
    callbacks: list[keras.callbacks.Callback] = [
        StopWhenDiverged(name),
        Progress(name, len(train.labels), recipe.batch_size, batches.num_batches, epochs),
    ]
    if on_epoch is not None:
        callbacks.append(
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: on_epoch(name, epoch, _floats(logs)))
        )
    if recipe.keep_best_epoch:
        # Its patience never runs out: it is here for the weights, not to stop.
        callbacks.append(keras.callbacks.EarlyStopping(monitor="val_loss", patience=epochs, restore_best_weights=True))
    began = time.monotonic()
    history = model.fit(
        batches,
        epochs=epochs,
        validation_data=Batches(validation.inputs, validation.labels, 256),
        callbacks=callbacks,
        verbose=0,
        shuffle=False,  # Batches does it, seeded
    ).history
    seconds = time.monotonic() - began
    per_epoch = tuple(_floats({key: values[i] for key, values in history.items()}) for i in range(epochs))
    best = min(range(epochs), key=lambda i: per_epoch[i]["val_loss"])
    return StageHistory(name, per_epoch, best, parameters, learning_rate, seconds, len(train.labels))


def _floats(logs: Mapping[str, object]) -> dict[str, float]:
    return {key: float(value) for key, value in logs.items()}  # type: ignore[arg-type]
