"""The same trainings on JAX: they learn what TensorFlow's learn, repeat themselves, resume, keep the best, export.

Keras takes one backend for a process' life, so JAX has a process of its own: this file, run as a program.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.errors import TrainingDiverged
from ml.models.catalog import build
from ml.models.vgg16_weights import Weights
from ml.settings import PROJECT_ROOT
from ml.training.checkpoint import Checkpoint, Position, read
from ml.training.fit import TrainedModel, train
from tests.model.conftest import BASELINE, TINY_VGG16, coloured, figures

EVERYTHING = BASELINE.with_overrides(
    {
        "augmentation": {"flip": True, "shift": 2, "cutout": 6, "mixup": 0.2, "cutmix": 1.0},
        "label_smoothing": 0.1,
        "weight_averaging": 0.8,
        "optimizer": {"name": "adamw", "weight_decay": 0.05},
    }
)
# Nothing that the backends draw by generators of their own, and no step that makes much of a rounding error.
COMPARABLE = BASELINE.with_overrides(
    {
        "augmentation": EVERYTHING.augmentation.model_dump(),
        "model.dropout": 0.0,
        "model.block_dropout": 0.0,
        "optimizer": {"name": "sgd"},
        "keep_best_epoch": False,
    }
)
TRAIN, VALIDATION = coloured(96, 1), coloured(48, 2)
# The more is learned, the worse it looks on these.
MISLABELLED = Split(VALIDATION.images, (VALIDATION.labels + 1) % 10, VALIDATION.ids)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights, and all else in a model, that both backends start from."""
    path = tmp_path_factory.mktemp("start") / "model.npz"
    keras.utils.set_random_seed(1)  # from one start in four rounding errors grow to more than is allowed below
    np.savez(path, *read(build(COMPARABLE.model).variables))
    return path


@pytest.fixture(scope="module")
def jax(start: Path) -> dict[str, Any]:
    """What the process with JAX found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.test_jax_backend", str(start)],
        cwd=PROJECT_ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            # The same programs are compiled for one training after the other.
            "JAX_COMPILATION_CACHE_DIR": str(start.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_from_the_same_weights_both_backends_learn_the_same(jax: dict[str, Any], start: Path) -> None:
    ((first, second),) = figures(from_the_start(start))
    ((its_first, its_second),) = jax["comparable"]
    assert jax["backend"] == "jax"
    assert its_first["loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert its_second["loss"] == pytest.approx(second["loss"], rel=1e-2)
    assert its_first["loss"] != its_second["loss"]


def test_jax_repeats_itself(jax: dict[str, Any]) -> None:
    assert jax["repeated"] == {"figures": True, "weights": True}


def test_a_resumed_training_on_jax_is_the_same_training(jax: dict[str, Any]) -> None:
    assert jax["resumed"] == {"figures": True, "weights": True}


def test_the_best_epochs_weights_are_kept_though_later_steps_reuse_their_memory(jax: dict[str, Any]) -> None:
    best = jax["best"]
    assert best["kept"] < len(best["losses"]) - 1
    assert best["measured"] == pytest.approx(min(best["losses"]), rel=1e-4)


def test_vgg16_trains_on_cached_features(jax: dict[str, Any]) -> None:
    vgg16 = jax["vgg16"]
    assert vgg16["cached_from"] == ["flatten", "block4_pool"]
    assert all(np.isfinite(loss) for loss in vgg16["losses"])


def test_what_jax_trained_is_exported_as_the_same_model(jax: dict[str, Any]) -> None:
    assert jax["export_difference"] < 1e-4


def test_a_loss_that_is_no_number_ends_it(jax: dict[str, Any]) -> None:
    assert "epoch 1, batch 1" in jax["diverged"]


def test_the_images_stay_where_they_are(jax: dict[str, Any]) -> None:
    """One buffer for all steps: an epoch that handed the table back and forth would make a new one each step."""
    assert jax["buffers_of_the_table"] == 1


def from_the_start(start: Path, **changed: np.ndarray) -> TrainedModel:
    """Trains from the file's values; `changed` replaces some, by their place in it."""
    with np.load(start) as file:
        values = {name: file[name] for name in file.files} | changed
    return train(COMPARABLE, TRAIN, VALIDATION, position=Position(run_id="", model=list(values.values())))


class _CutOffError(Exception):
    pass


def _cut_off(_stage: str, epoch: int, _figures: object) -> None:
    if epoch == 0:
        raise _CutOffError


def _alike(one: TrainedModel, other: TrainedModel) -> dict[str, bool]:
    weights = zip(one.model.weights, other.model.weights, strict=True)
    return {
        "figures": figures(one) == figures(other),
        "weights": all(np.array_equal(left, right) for left, right in weights),
    }


def _resumed(folder: Path) -> TrainedModel:
    checkpoint = Checkpoint(folder, {})
    with pytest.raises(_CutOffError):
        train(EVERYTHING, TRAIN, VALIDATION, on_epoch=_cut_off, checkpoint=checkpoint)
    return train(EVERYTHING, TRAIN, VALIDATION, checkpoint=checkpoint, position=checkpoint.load())


def _best() -> dict[str, object]:
    trained = train(EVERYTHING.with_overrides({"stages.fit.epochs": 3}), TRAIN, MISLABELLED)
    (stage,) = trained.stages
    found = trained.model.predict_on_batch(VALIDATION.images.astype(np.float32))
    smooth = 0.9 * np.eye(10)[MISLABELLED.labels] + 0.01
    measured = -(smooth * np.log(np.clip(found, 1e-7, 1))).sum(axis=1).mean()
    return {"kept": stage.kept_epoch, "losses": [epoch["val_loss"] for epoch in stage.epochs], "measured": measured}


def _vgg16() -> dict[str, object]:
    few = coloured(32, 3)
    trained = train(TINY_VGG16, few, few, Weights("random"))
    return {
        "cached_from": [stage.cached_from for stage in trained.stages],
        "losses": [epoch["val_loss"] for stage in trained.stages for epoch in stage.epochs],
    }


def _diverged(start: Path) -> str:
    with np.load(start) as file:
        poison = np.full_like(file["arr_0"], np.inf)
    with pytest.raises(TrainingDiverged) as caught:
        from_the_start(start, arr_0=poison)
    return str(caught.value)


def _buffers_of_the_table() -> int:
    """How many places in memory the images had at the ends of an epoch's steps."""
    from ml.training.augmentation import AugmentedImages

    seen = set()

    class Watch(keras.callbacks.Callback):  # type: ignore[misc]  # keras is untyped
        def on_train_batch_end(self, *_: object, **__: object) -> None:
            state = self.model._jax_state["non_trainable_variables"]
            seen.update(value.unsafe_buffer_pointer() for value in state if value.dtype == np.uint8)

    source = {"index": keras.Input((), dtype="int32", name="index")}
    pixels = keras.layers.Flatten()(AugmentedImages(TRAIN.images)(source))
    model = keras.Model(source, keras.layers.Dense(10, activation="softmax")(pixels))
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    index = {"index": np.arange(len(TRAIN.labels), dtype=np.int32)}
    model.fit(index, TRAIN.labels, batch_size=16, verbose=0, callbacks=[Watch()])
    return len(seen)


class _NoTensorFlow:
    """As on a machine that TensorFlow has no build for: who imports it fails. It is ten seconds less, too."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.split(".", maxsplit=1)[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _main(start: Path) -> None:
    sys.meta_path.insert(0, _NoTensorFlow())

    from ml.training.export import export

    with tempfile.TemporaryDirectory() as folder:
        once = train(EVERYTHING, TRAIN, VALIDATION)
        found = {
            "backend": keras.backend.backend(),
            "comparable": figures(from_the_start(start)),
            "repeated": _alike(once, train(EVERYTHING, TRAIN, VALIDATION)),
            "resumed": _alike(once, _resumed(Path(folder))),
            "best": _best(),
            "export_difference": export(once.model, Path(folder), VALIDATION.images).max_difference,
            "vgg16": _vgg16(),
            "diverged": _diverged(start),
            "buffers_of_the_table": _buffers_of_the_table(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
