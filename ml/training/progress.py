"""What a training says while it runs, and when it is stopped because it can no longer come to anything."""

import logging
import math
import time
from typing import Any

import keras

from ml.errors import TrainingDiverged

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Progress(keras.callbacks.Callback):  # type: ignore[misc]  # keras is untyped
    """Logs each epoch, and within it at least every five seconds: batches, loss, accuracy, images/s, time left."""

    def __init__(self, stage: str, images: int, batch_size: int, batches: int, epochs: int) -> None:
        super().__init__()
        self._stage, self._images, self._batch_size, self._batches, self._epochs = (
            stage,
            images,
            batch_size,
            batches,
            epochs,
        )
        self._began = self._shown = 0.0
        self._epoch = 0
        self._first: int | None = None

    def on_train_begin(self, _logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._began = self._shown = time.monotonic()
        self._first = None

    def on_epoch_begin(self, epoch: int, _logs: dict[str, Any] | None = None) -> None:
        """Remembers which epoch runs, and which was the first on this clock: a resumed training begins later."""
        self._epoch = epoch
        if self._first is None:
            self._first = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Says where the epoch stands, if the last word was five seconds ago."""
        now = time.monotonic()
        if now - self._shown < EVERY_SECONDS or batch + 1 >= self._batches or logs is None:
            return
        self._shown = now
        done = self._done(self._epoch) + (batch + 1) * self._batch_size
        rate = done / (now - self._began)
        logger.info(
            "%s: epoch %d/%d, batch %d/%d: loss %.3f, accuracy %.3f; %.0f images/s, about %.0f s left",
            *(self._stage, self._epoch + 1, self._epochs, batch + 1, self._batches),
            *(logs["loss"], logs["accuracy"], rate, (self._done(self._epochs) - done) / rate),
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Says what the epoch came to."""
        now = self._shown = time.monotonic()
        seconds = now - self._began
        rate = self._done(epoch + 1) / seconds
        values = logs or {}
        logger.info(
            "%s: epoch %d/%d done: loss %.3f, accuracy %.3f, validation loss %.3f, validation accuracy %.3f; "
            "%.0f images/s, about %.0f s left",
            *(self._stage, epoch + 1, self._epochs),
            *(values.get(key, math.nan) for key in ("loss", "accuracy", "val_loss", "val_accuracy")),
            *(rate, (self._epochs - epoch - 1) * self._images / rate),
        )

    def _done(self, epochs: int) -> int:
        """Images between the first epoch on this clock and the end of so many epochs."""
        return (epochs - (self._first or 0)) * self._images


class StopWhenDiverged(keras.callbacks.Callback):  # type: ignore[misc]  # keras is untyped
    """Raises TrainingDiverged at the batch after which the loss is no number, or at such a validation loss."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self._stage, self._epoch = stage, 0

    def on_epoch_begin(self, epoch: int, _logs: dict[str, Any] | None = None) -> None:
        """Remembers which epoch runs."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """The loss that Keras hands over is the epoch's running mean, which one NaN makes NaN."""
        self._check((logs or {}).get("loss"), f"batch {batch + 1}")

    def on_epoch_end(self, _epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks the validation loss."""
        self._check((logs or {}).get("val_loss"), "its validation")

    def _check(self, loss: float | None, where: str) -> None:
        if loss is None or not math.isfinite(loss):
            raise TrainingDiverged(
                f"{self._stage}: the loss became {loss} in epoch {self._epoch + 1}, {where}.",
                fix="lower the recipe's learning_rate (a tenth is a good next try); nothing was registered.",
            )
