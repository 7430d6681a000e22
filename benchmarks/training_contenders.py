"""One contender of the training benchmark, in a process of its own: it measures a little, says so, and waits.

Started by `benchmarks.training`, which sends what to do as one line of JSON on stdin and then a line for each further
sample; a sample is one line of JSON on stdout. Waiting between samples is what lets contenders alternate on one
machine, each with its graph traced and warm; a process each is what tells their peak memories apart. The `first` sample
of its kind holds the tracing and compiling.
"""

import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from ml.datasets.manifest import Split
from ml.models.catalog import build
from ml.models.vgg16_weights import Weights
from ml.training import fit
from ml.training.feature_cache import FeatureCache
from ml.training.recipe import Recipe, parse_recipe

Say = Callable[[Mapping[str, object]], None]
"""Tells one sample, and returns when the next is wanted."""

_CHUNK = 256
"""Images that `ml.training.fit` takes through the frozen layers at one time."""


def ours(job: Mapping[str, Any], say: Say) -> None:
    """Epochs of `ml.training.fit.train`; before them, chunks of images through the frozen prefix where there is one.

    An epoch's seconds go from one sample to the next, as plain Keras' do, and hold its validation, too; few images are
    for that.
    """
    images, labels = _data(job, job["images"])
    few = _split(images[:64], labels[:64])
    recipe = _recipe(job)

    resumed = time.perf_counter()

    def on_epoch(_stage: str, epoch: int, _figures: Mapping[str, float]) -> None:
        nonlocal resumed
        rate = len(labels) / (time.perf_counter() - resumed)
        say({"kind": "fit", "first": not epoch, "images_per_second": rate})
        resumed = time.perf_counter()

    with tempfile.TemporaryDirectory(prefix="bench-features-") as folder:
        cache = _SampledCache(Path(folder), chunks=job["chunks"], say=say)
        fit.train(recipe, _split(images, labels), few, _weights(recipe), on_epoch=on_epoch, features=cache)


def plain(job: Mapping[str, Any], say: Say) -> None:
    """`model.fit(x, y, batch_size=64, epochs=...)` of Keras, as its documentation writes it; a sample for each epoch.

    `images_per_second` is of the whole epoch, which is what one waits for. `between_batches` is from the end of its
    first batch to the end of its last, without what Keras does around an epoch: there its tf.data pipeline's destructor
    waits for a tuner that sleeps in doubling steps, so that an epoch takes up to twice as long, by chance of length.
    """
    images, labels = _data(job, job["images"])
    recipe = _recipe(job)
    model, x = _plain_model(recipe, images)
    (stage,) = recipe.stages
    model.compile(
        optimizer=keras.optimizers.Adam(stage.learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    size, steps = recipe.batch_size, job["steps"]
    clock = _Clock(say, len(labels) if steps is None else steps * size, size)
    model.fit(x, labels, batch_size=size, epochs=stage.epochs, steps_per_epoch=steps, callbacks=[clock], verbose=0)


def accuracy_ours(job: Mapping[str, Any], say: Say) -> None:
    """Validation accuracy of each epoch, by `ml.training.fit.train`; `end_to_end`: nothing of it cached."""
    train, validation = _learning(job)
    recipe = _recipe(job)
    if job.get("end_to_end"):
        fit._Run._cut = lambda *_: 0  # type: ignore[method-assign]  # as if there were no cache at all
    trained = fit.train(recipe, train, validation, _weights(recipe))
    (stage,) = trained.stages
    say(
        {
            "accuracies": [epoch["val_accuracy"] for epoch in stage.epochs],
            "losses": [epoch["val_loss"] for epoch in stage.epochs],
            "cached_from": stage.cached_from,
        }
    )


def accuracy_plain(job: Mapping[str, Any], say: Say) -> None:
    """Validation accuracy of each epoch, by Keras' own `fit`. Without XLA: it computes the same, and takes longer."""
    train, validation = _learning(job)
    recipe = _recipe(job)
    (stage,) = recipe.stages
    keras.utils.set_random_seed(recipe.seed)
    model, x = _plain_model(recipe, train.images)
    model.compile(
        optimizer=keras.optimizers.Adam(stage.learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    history = model.fit(
        x,
        train.labels,
        batch_size=recipe.batch_size,
        epochs=stage.epochs,
        validation_data=(validation.images, validation.labels),
        verbose=0,
    )
    say({"accuracies": history.history["val_accuracy"]})


class _Clock(keras.callbacks.Callback):  # type: ignore[misc]  # keras is untyped
    """Says a sample at each epoch's end; its seconds begin where the sample before it was answered."""

    def __init__(self, say: Say, images: int, batch_size: int) -> None:
        super().__init__()
        self._say, self._images, self._batch_size = say, images, batch_size
        self._resumed = time.perf_counter()
        self._ends: list[float] = []

    def on_train_batch_end(self, *_: object, **__: object) -> None:
        """Notes the time."""
        self._ends.append(time.perf_counter())

    def on_epoch_end(self, epoch: int, *_: object, **__: object) -> None:
        """The epoch's rates."""
        now = time.perf_counter()
        self._say(
            {
                "kind": "fit",
                "first": epoch == 0,
                "images_per_second": self._images / (now - self._resumed),
                "between_batches": (self._images - self._batch_size) / (self._ends[-1] - self._ends[0]),
                "xla": bool(self.model.jit_compile),
            }
        )
        self._ends.clear()
        self._resumed = time.perf_counter()


class _SampledCache(FeatureCache):
    """Runs the frozen prefix on the first chunks of the images alone, and fills the rest with copies of those.

    What the features are changes no speed; so the prefix's rate is known from a part, and the tail's memory and speed
    from the whole.
    """

    def __init__(self, folder: Path, *, chunks: int, say: Say) -> None:
        super().__init__(folder, 2**40)
        self._chunks, self._say = chunks, say

    def array(self, key: str, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> np.ndarray:
        """As the class says."""

        def some(features: np.ndarray) -> None:
            if len(features) <= _CHUNK:
                fill(features)
                return
            part = _FirstChunks(features, self._chunks, self._say)
            try:
                fill(part)  # type: ignore[arg-type]  # it only writes rows
            except _EnoughError:
                for start in range(part.filled, len(features), part.filled):
                    rest = features[start : start + part.filled]
                    rest[:] = features[: len(rest)]

        return super().array(key, shape, some)


class _EnoughError(Exception):
    """As many chunks are there as were wanted."""


class _FirstChunks:
    """Rows of an array that are written in order, timed; raises when there are enough."""

    def __init__(self, features: np.ndarray, wanted: int, say: Say) -> None:
        self._features, self._left, self._say = features, wanted, say
        self._began = time.perf_counter()
        self.filled = 0

    def __len__(self) -> int:
        return len(self._features)

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        seconds = time.perf_counter() - self._began
        self._features[rows] = values
        first = not self.filled
        self.filled += len(values)
        self._left -= 1
        self._say({"kind": "extraction", "first": first, "images_per_second": len(values) / seconds})
        if not self._left or self.filled == len(self):
            raise _EnoughError
        self._began = time.perf_counter()


def _plain_model(recipe: Recipe, images: np.ndarray) -> tuple[keras.Model, np.ndarray]:
    """The recipe's architecture, frozen as its stage says, as one writes it with Keras alone; and what it is fed."""
    if recipe.architecture == "baseline":
        return build(recipe.model), images
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in base.layers[:-4]:  # all but block5_conv1..3 and the pool
        layer.trainable = False
    spec: Any = recipe.model
    head = [
        layers.Flatten(),
        layers.Dense(spec.dense_units, activation="relu"),
        layers.Dropout(spec.dropout),
        layers.Dense(10, activation="softmax"),
    ]
    return keras.Sequential([base, *head]), keras.applications.vgg16.preprocess_input(images.astype("float32"))


def _recipe(job: Mapping[str, Any]) -> Recipe:
    return parse_recipe(job["recipe"], origin="the benchmark")


def _weights(recipe: Recipe) -> Weights | None:
    return Weights("random") if recipe.architecture == "vgg16" else None


def _data(job: Mapping[str, Any], count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """So many images, copied out of the benchmark's file: what else lies there is not in this process' memory."""
    folder = Path(job["data"])
    images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
    return np.array(images[start : start + count]), np.array(labels[start : start + count])


def _learning(job: Mapping[str, Any]) -> tuple[Split, Split]:
    """Images to learn from, and behind them those to be judged on."""
    count = job["images"]
    return _split(*_data(job, count)), _split(*_data(job, job["validation"], count))


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images, labels, ())


def _main() -> None:
    # What libraries print must not stand between the samples.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(sample: Mapping[str, object]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**sample, "peak_memory_mib": peak}), file=answers, flush=True)
        if not sys.stdin.readline():
            # Nobody wants more.
            answers.flush()
            os._exit(0)

    kinds = {"ours": ours, "plain": plain, "accuracy_ours": accuracy_ours, "accuracy_plain": accuracy_plain}
    while line := sys.stdin.readline():
        job = json.loads(line)
        kinds[job["kind"]](job, say)
        gc.collect()


if __name__ == "__main__":
    _main()
