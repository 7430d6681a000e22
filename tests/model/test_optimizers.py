"""Rates and steps against NumPy: schedules, rates per layer, weight decay, the mean of the weights."""

from typing import Any

import keras
import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.training import stages
from ml.training.fit import train
from ml.training.optimizers import build_optimizer, learning_rate
from ml.training.recipe import Optimizer, Stage
from tests.model.conftest import BASELINE, first

STEPS = 7


def stage(**changes: Any) -> Stage:
    return Stage(**{"name": "fit", "epochs": 5, "learning_rate": 0.4} | changes)


def rates(of: Stage) -> np.ndarray:
    rate = learning_rate(of, STEPS)
    return np.array([float(rate(step)) if callable(rate) else rate for step in range(of.epochs * STEPS + 1)])


def by_hand(of: Stage) -> np.ndarray:
    warm = round(of.warmup_epochs * STEPS)
    values = []
    for step in range(of.epochs * STEPS + 1):
        if step < warm:
            values.append(of.learning_rate * step / warm)
        elif of.schedule == "constant":
            values.append(of.learning_rate)
        else:
            done = (step - warm) / (of.epochs * STEPS - warm)
            values.append(of.learning_rate * (1 + np.cos(np.pi * done)) / 2)
    return np.array(values)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 2.5])
def test_rates_follow_the_schedule(schedule: str, warmup: float) -> None:
    of = stage(schedule=schedule, warmup_epochs=warmup)
    found = rates(of)
    assert np.allclose(found, by_hand(of), atol=1e-6)
    assert found.max() == pytest.approx(0.4)
    assert found[-1] == pytest.approx(0.4 if schedule == "constant" else 0, abs=1e-6)
    assert (found[0] == 0) == (warmup > 0)


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(3, 3, name="conv")(image)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(4, name="dense")(x)
    return keras.Model(image, keras.layers.Dense(2, name="probabilities")(x))


def made(model: keras.Model, optimizer: Optimizer, of: Stage, averaging: float = 0) -> keras.optimizers.Optimizer:
    with_weights = [layer for layer in model.layers if layer.weights]
    return build_optimizer(optimizer, of, STEPS, weight_averaging=averaging, model=model, layers=with_weights)


DEPTHS = {"conv": 3, "norm": 2, "dense": 1, "probabilities": 0}


def step(model: keras.Model, optimizer: keras.optimizers.Optimizer, scale: float = 1) -> dict[str, tuple[Any, Any]]:
    """One step along random gradients: what changed and the gradient, by the variable's path."""
    variables = model.trainable_variables
    rng = np.random.default_rng(1)
    slopes = [scale * rng.normal(size=variable.shape).astype(np.float32) for variable in variables]
    before = [np.array(variable) for variable in variables]
    optimizer.apply([keras.ops.convert_to_tensor(slope) for slope in slopes], variables)
    return {
        variable.path: (np.asarray(variable) - old, slope)
        for variable, old, slope in zip(variables, before, slopes, strict=True)
    }


def test_each_layer_learns_at_its_own_rate(model: keras.Model) -> None:
    optimizer = made(model, Optimizer(name="sgd", momentum=0.0), stage(layer_decay=0.5))
    for path, (change, slope) in step(model, optimizer).items():
        rate = 0.4 * 0.5 ** DEPTHS[path.split("/")[0]]
        assert np.allclose(change, -rate * slope, rtol=1e-4, atol=1e-6), path


def test_adams_steps_are_scaled_though_its_gradients_are_not(model: keras.Model) -> None:
    """Its first step is rate times the gradient's sign, however large that is."""
    optimizer = made(model, Optimizer(name="adam"), stage(layer_decay=0.5, learning_rate=0.01))
    for path, (change, slope) in step(model, optimizer).items():
        rate = 0.01 * 0.5 ** DEPTHS[path.split("/")[0]]
        assert np.allclose(change, -rate * np.sign(slope), rtol=1e-2), path


def test_frozen_layers_do_not_count_in_the_depth(model: keras.Model) -> None:
    model.get_layer("conv").trainable = False
    model.get_layer("norm").trainable = False
    optimizer = made(model, Optimizer(name="sgd", momentum=0.0), stage(layer_decay=0.1))
    changes = step(model, optimizer)
    assert {path.split("/")[0] for path in changes} == {"dense", "probabilities"}
    assert np.allclose(changes["dense/kernel"][0], -0.04 * changes["dense/kernel"][1], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_decay_takes_a_share_of_kernels_and_spares_biases_and_norms(
    model: keras.Model, name: str, layer_decay: float
) -> None:
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(2).normal(1, 0.1, variable.shape))
    before = {variable.path: np.array(variable) for variable in model.trainable_variables}
    optimizer = made(model, Optimizer(name=name, weight_decay=0.1), stage(layer_decay=layer_decay))  # type: ignore[arg-type]
    for path, (change, _) in step(model, optimizer, scale=0).items():
        rate = 0.4 * layer_decay ** DEPTHS[path.split("/")[0]]
        taken = rate * 0.1 * before[path] if path.endswith("kernel") else np.zeros_like(change)
        assert np.allclose(change, -taken, rtol=1e-4, atol=1e-6), path
    assert sum(path.endswith("kernel") for path in before) == 3


def test_sgd_has_nesterovs_momentum(model: keras.Model) -> None:
    optimizer = made(model, Optimizer(name="sgd", momentum=0.9), stage())
    for change, slope in step(model, optimizer).values():
        assert np.allclose(change, -0.4 * 1.9 * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_best", [True, False])
def test_what_is_kept_and_measured_is_the_mean_of_the_weights(
    train_split: Split, validation_split: Split, monkeypatch: pytest.MonkeyPatch, keep_best: bool
) -> None:
    after_each_step: list[list[np.ndarray]] = []

    class Recording(stages.Progress):
        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            after_each_step.append([np.array(variable) for variable in self.model.trainable_variables])

    monkeypatch.setattr(stages, "Progress", Recording)
    recipe = BASELINE.with_overrides(
        {"weight_averaging": 0.8, "keep_best_epoch": keep_best, "optimizer.name": "sgd", "stages.fit.epochs": 3}
    )
    trained = train(recipe, first(train_split, 96), validation_split)
    (of,) = trained.stages
    assert len(after_each_step) == 9
    mean = after_each_step[0]
    for values in after_each_step[1 : 3 * (of.kept_epoch + 1)]:
        mean = [0.8 * old + 0.2 * new for old, new in zip(mean, values, strict=True)]
    for kept, expected in zip(trained.model.trainable_variables, mean, strict=True):
        assert np.allclose(kept, expected, atol=1e-5), kept.path
    trained.model.compile(loss="sparse_categorical_crossentropy")
    loss = trained.model.evaluate(validation_split.images, validation_split.labels, batch_size=256, verbose=0)
    assert loss == pytest.approx(of.epochs[of.kept_epoch]["val_loss"], rel=1e-4)
