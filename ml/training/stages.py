"""One stage of a training: compile, fit, watch the validation set, keep the figures and the best epoch's weights."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from ml.training.batches import Batches, feed
from ml.training.checkpoint import Checkpoint, Position, assign, read
from ml.training.optimizers import build_optimizer
from ml.training.progress import Progress, StopWhenDiverged
from ml.training.recipe import Recipe, Stage

logger = logging.getLogger(__name__)

OnEpoch = Callable[[str, int, Mapping[str, float]], None]
"""Called with the stage's name, the epoch (from 0) and its figures, while the training runs. What it raises ends it."""


@dataclass(frozen=True, slots=True)
class StageHistory:
    """What one stage did. `epochs` has loss, accuracy, val_loss and val_accuracy of each, and images_per_second."""

    name: str
    epochs: tuple[Mapping[str, float], ...]
    kept_epoch: int
    """Index of the epoch whose weights the stage ended with."""
    trainable_parameters: int
    learning_rate: float
    seconds: float
    """Of the fit, epochs before an interruption included; extraction of features not."""
    images: int
    cached_from: str | None
    """The last layer of the frozen prefix whose output was cached; None where images ran through the whole model."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """What a stage trains: `network` is compiled and fitted, `model` is the whole model whose variables it shares."""

    network: keras.Model
    model: keras.Model
    train: Batches
    validation: Batches
    images: int
    soft_labels: bool
    compile_with_xla: bool
    cached_from: str | None = None
    first_epoch: int = 0
    """Epochs that the recipe has before this stage: batches are drawn by an epoch's number in the whole training."""


def run_stage(
    stage: Stage,
    recipe: Recipe,
    what: Trainable,
    *,
    on_epoch: OnEpoch | None = None,
    position: Position | None = None,
    checkpoint: Checkpoint | None = None,
) -> StageHistory:
    """Trains what is trainable in `what.network`, in place.

    The loss is categorical cross-entropy, in its sparse form where labels are one class each: the value is the same,
    without 45,000 x 10 floats.

    Args:
        stage: the recipe's, whose rate, schedule and epochs count.
        recipe: the rest of the choices.
        what: the network and its batches.
        on_epoch: told each epoch's figures while the training runs.
        position: where the training stands: fresh, or as a checkpoint remembers it; kept up to date.
        checkpoint: is given the position after each epoch.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
        StorageError: a checkpoint could not be written.
    """
    position = position or Position(run_id="")
    steps = what.train.num_batches
    optimizer = build_optimizer(
        recipe.optimizer,
        stage,
        steps,
        weight_averaging=recipe.weight_averaging,
        model=what.network,
        layers=[layer for layer in what.model.layers if layer.weights],
    )
    loss: Any = "sparse_categorical_crossentropy"
    if what.soft_labels:
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    what.network.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=what.compile_with_xla)
    optimizer = what.network.optimizer  # in mixed_float16 Keras puts one that scales the loss around it
    if not optimizer.built:
        optimizer.build(what.network.trainable_variables)
    done = len(position.epochs)
    if done:
        assign(what.model.variables, position.model)
        assign(optimizer.variables, position.optimizer)
        logger.info("%s: resumed after epoch %d of %d", stage.name, done, stage.epochs)
    parameters = sum(int(np.prod(weight.shape)) for weight in what.network.trainable_weights)
    logger.info(
        "%s: %d images, %d epochs of %d batches, %s trainable parameters",
        *(stage.name, what.images, stage.epochs, steps, f"{parameters:,}"),
    )
    keeper = _Keeper(stage=stage, recipe=recipe, what=what, position=position, on_epoch=on_epoch, checkpoint=checkpoint)
    callbacks: list[keras.callbacks.Callback] = [
        StopWhenDiverged(stage.name),
        Progress(stage.name, what.images, recipe.batch_size, steps, stage.epochs),
        *([keras.callbacks.SwapEMAWeights()] if recipe.weight_averaging else []),
        keeper,
    ]
    # An early stop that came with the checkpoint's epoch stays one.
    if done < stage.epochs and not keeper.has_stopped():
        what.network.fit(
            feed(what.train),
            epochs=stage.epochs,
            initial_epoch=done,
            validation_data=feed(what.validation),
            callbacks=callbacks,
            verbose=0,
            shuffle=False,  # the batches do it, seeded
        )
    keeper.restore()
    return StageHistory(
        stage.name,
        tuple(position.epochs),
        keeper.kept_epoch(),
        parameters,
        stage.learning_rate,
        position.seconds,
        what.images,
        what.cached_from,
    )


class _Keeper(keras.callbacks.Callback):  # type: ignore[misc]  # keras is untyped
    """After each epoch: its figures, the best weights so far, the checkpoint; decides on an early stop."""

    def __init__(
        self,
        *,
        stage: Stage,
        recipe: Recipe,
        what: Trainable,
        position: Position,
        on_epoch: OnEpoch | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        super().__init__()
        self._stage, self._recipe, self._what, self._position = stage, recipe, what, position
        self._on_epoch, self._checkpoint = on_epoch, checkpoint
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, _logs: dict[str, Any] | None = None) -> None:
        """Tells the batches which epoch they are of."""
        self._what.train.epoch = self._what.first_epoch + epoch
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps what the epoch came to."""
        position = self._position
        seconds = time.monotonic() - self._began
        position.seconds += seconds
        figures = {key: float(value) for key, value in (logs or {}).items()}
        position.epochs.append({**figures, "images_per_second": self._what.images / seconds})
        if self._recipe.keep_best_epoch and self._best() == epoch:
            position.best = self._measured_weights()
        if self._checkpoint is not None:
            position.model = read(self._what.model.variables)
            position.optimizer = read(self._what.network.optimizer.variables)
            self._checkpoint.save(position)
        if self.has_stopped():
            logger.info(
                "%s: no lower validation loss in %d epochs; ends", self._stage.name, self._recipe.early_stopping
            )
            self._what.network.stop_training = True
        if self._on_epoch is not None:
            self._on_epoch(self._stage.name, epoch, position.epochs[-1])

    def has_stopped(self) -> bool:
        """Whether the recipe's patience is used up."""
        patience, epochs = self._recipe.early_stopping, len(self._position.epochs)
        return patience is not None and epochs > 0 and epochs - 1 - self._best() >= patience

    def kept_epoch(self) -> int:
        """Index of the epoch whose weights the stage ends with."""
        return self._best() if self._recipe.keep_best_epoch else len(self._position.epochs) - 1

    def restore(self) -> None:
        """Gives the model the weights that the stage ends with."""
        if self._recipe.keep_best_epoch:
            self._what.model.set_weights(self._position.best)
        else:
            self._what.model.set_weights(self._measured_weights())

    def _best(self) -> int:
        losses = [epoch["val_loss"] for epoch in self._position.epochs]
        return losses.index(min(losses))

    def _measured_weights(self) -> list[np.ndarray]:
        """The whole model's weights as they were measured: with the mean of those that learn, where one is kept."""
        averages: dict[int, Any] = {}
        if self._recipe.weight_averaging:
            optimizer = self._what.network.optimizer
            optimizer = getattr(optimizer, "inner_optimizer", optimizer)
            # As keras.callbacks.SwapEMAWeights finds them.
            pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
            averages = {id(variable): average for variable, average in pairs}
        return [np.asarray(averages.get(id(weight), weight)) for weight in self._what.model.weights]


def summaries(stages: Sequence[StageHistory]) -> list[dict[str, Any]]:
    """The stages as plain values for JSON and checkpoints; `histories` reads them back."""
    return [
        {name: getattr(stage, name) for name in StageHistory.__dataclass_fields__ if name != "epochs"}
        | {"epochs": [dict(epoch) for epoch in stage.epochs]}
        for stage in stages
    ]


def histories(plain: Sequence[Mapping[str, Any]]) -> tuple[StageHistory, ...]:
    """What `summaries` made plain."""
    return tuple(StageHistory(**{**stage, "epochs": tuple(stage["epochs"])}) for stage in plain)
