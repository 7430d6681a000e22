"""Training: that it learns, repeats itself, ends as its recipe says, and that cached features change nothing."""

import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from ml.datasets import synthetic
from ml.datasets.manifest import Split
from ml.errors import ConfigurationError, TrainingDiverged
from ml.models.catalog import build
from ml.models.chain import chain_of
from ml.models.specs import Vgg16Spec
from ml.models.vgg16_weights import Weights
from ml.training import fit, kernels, progress
from ml.training.batches import Batches
from ml.training.checkpoint import assign, read
from ml.training.feature_cache import FeatureCache
from ml.training.fit import TrainedModel, train
from ml.training.recipe import Recipe, Stage
from ml.training.stages import Trainable, histories, summaries
from tests.model.conftest import BASELINE, TINY_VGG16, figures, first

tf = pytest.importorskip("tensorflow")


def end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every image runs through the whole model, whatever is frozen."""
    monkeypatch.setattr(fit._Run, "_cut", lambda _run, _stage: 0)


def loss_on(model: keras.Model, split: Split) -> float:
    model.compile(loss="sparse_categorical_crossentropy")
    return float(model.evaluate(split.images, split.labels, batch_size=256, verbose=0))


def test_baseline_learns_and_repeats_itself(
    train_split: Split, validation_split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, dict[str, float]]] = []
    with caplog.at_level(logging.INFO, "ml"):
        one, other = (
            train(BASELINE, train_split, validation_split, on_epoch=lambda *a: told.append((a[0], a[1], dict(a[2]))))
            for _ in range(2)
        )
    (stage,) = one.stages
    assert stage.epochs[stage.kept_epoch]["val_accuracy"] > 0.5
    assert set(stage.epochs[0]) == {"loss", "accuracy", "val_loss", "val_accuracy", "images_per_second"}
    assert (stage.images, stage.cached_from, stage.learning_rate) == (320, None, 0.01)
    assert figures(one) == figures(other)
    for a, b in zip(one.model.weights, other.model.weights, strict=True):
        assert np.array_equal(a, b)
    assert told[:2] == [("fit", i, dict(stage.epochs[i])) for i in range(2)]
    assert "epoch 2/2 done" in caplog.text
    assert "images/s" in caplog.text
    assert (one.weights, one.recipe) == ("from scratch", BASELINE)
    assert histories(summaries(one.stages)) == one.stages


def test_another_seed_is_another_start_and_another_order(train_split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    class BegunError(Exception):
        pass

    begun: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(_stage: Stage, _recipe: Recipe, what: Trainable, **_: object) -> None:
        inputs, _labels = what.train[0]
        begun.append((np.asarray(what.model.get_layer("dense").kernel), inputs["index"]))
        raise BegunError

    monkeypatch.setattr(fit, "run_stage", begin)
    for seed in (4, 4, 5):
        with pytest.raises(BegunError):
            train(BASELINE.with_overrides({"seed": seed}), train_split, train_split)
    first_time, again, another = begun
    for one, same, other in zip(first_time, again, another, strict=True):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_baseline_learns_the_stand_in() -> None:
    raw = synthetic.generate(train=1500, test=300, seed=3)
    changes = {
        "model": {"filters": [16, 32], "dense_units": 64, "dropout": 0.0, "block_dropout": 0.0}
        | {"batch_norm_momentum": 0.8},
        "stages.fit.epochs": 4,
        "stages.fit.learning_rate": 0.002,
    }
    trained = train(
        BASELINE.with_overrides(changes),
        Split(raw.train_images, raw.train_labels, ("",) * 1500),
        Split(raw.test_images, raw.test_labels, ("",) * 300),
    )
    assert max(epoch["val_accuracy"] for epoch in trained.stages[0].epochs) > 0.25  # chance is 0.1


def test_a_stage_ends_with_its_best_epoch_or_its_last_and_stops_when_nothing_gets_better(
    train_split: Split, validation_split: Split
) -> None:
    few = first(train_split, 128)
    # The more it learns of the colours, the worse it does on images whose labels are all the next class.
    opposed = Split(validation_split.images, (validation_split.labels + 1) % 10, validation_split.ids)
    recipe = BASELINE.with_overrides({"stages.fit.epochs": 5})
    best, last, stopped = (
        train(recipe.with_overrides(changes), few, opposed)
        for changes in ({}, {"keep_best_epoch": False}, {"early_stopping": 2})
    )
    losses = [epoch["val_loss"] for epoch in best.stages[0].epochs]
    kept = losses.index(min(losses))
    assert kept < 4, "it must get worse at some time for this test to say anything"
    assert best.stages[0].kept_epoch == kept
    assert loss_on(best.model, opposed) == pytest.approx(losses[kept], rel=1e-4)
    assert figures(last) == figures(best)
    assert last.stages[0].kept_epoch == 4
    assert loss_on(last.model, opposed) == pytest.approx(losses[4], rel=1e-4)
    ends = next(i for i in range(5) if i - np.argmin(losses[: i + 1]) == 2)
    assert ends < 4, "it must stop before its time for this test to say anything"
    assert figures(stopped)[0] == figures(best)[0][: ends + 1]
    assert stopped.stages[0].kept_epoch == ends - 2
    assert loss_on(stopped.model, opposed) == pytest.approx(losses[ends - 2], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training_at_once(
    train_split: Split, validation_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.training.fit.build", lambda spec, weights: _poisoned(build(spec, weights)))
    with pytest.raises(TrainingDiverged, match=r"epoch 1, batch 1\b") as caught:
        train(BASELINE, train_split, validation_split)
    assert "learning_rate" in caught.value.fix


def _poisoned(model: keras.Model) -> keras.Model:
    dense = model.get_layer("dense")
    kernel, bias = dense.get_weights()
    dense.set_weights([kernel, np.full_like(bias, np.inf)])
    return model


def test_an_infinite_validation_loss_ends_it_too() -> None:
    callback = progress.StopWhenDiverged("fit")
    callback.on_epoch_begin(2)
    callback.on_epoch_end(2, {"loss": 1.0, "val_loss": 1.0})
    with pytest.raises(TrainingDiverged, match="epoch 3, its validation"):
        callback.on_epoch_end(2, {"loss": 1.0, "val_loss": float("inf")})


def test_what_cannot_work_is_refused_before_anything_is_built(
    train_split: Split, validation_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "build", lambda *_: pytest.fail("it built a model"))
    with pytest.raises(ConfigurationError, match=r"batches of 32, and there are 31 training images"):
        train(BASELINE, first(train_split, 31), validation_split)


@pytest.mark.parametrize("before", [0, 3])
def test_long_epochs_are_reported_within_and_a_resumed_ones_speed_is_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback = progress.Progress("fit", images=1000, batch_size=10, batches=100, epochs=before + 2)
    callback.on_train_begin()
    callback.on_epoch_begin(before)
    with caplog.at_level(logging.INFO):
        for batch in range(20):
            now[0] += 1
            callback.on_train_batch_end(batch, {"loss": 1.5, "accuracy": 0.4})
        now[0] = 200
        callback.on_epoch_end(before, {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.5})
    said = "10 images/s, about {} s left"
    *within, done = [record.getMessage() for record in caplog.records]
    epoch = f"fit: epoch {before + 1}/{before + 2}"
    assert within == [
        f"{epoch}, batch {n}/100: loss 1.500, accuracy 0.400; {said.format(200 - n)}" for n in (5, 10, 15, 20)
    ]
    assert done.startswith(f"{epoch} done")
    assert done.endswith(said.format(100))


def alike(one: TrainedModel, other: TrainedModel) -> None:
    """The same training but for the order of sums."""
    for mine, its in zip(figures(one), figures(other), strict=True):
        for left, right in zip(mine, its, strict=True):
            assert left == pytest.approx(right, rel=2e-3, abs=1e-4)
    for left, right in zip(one.model.weights, other.model.weights, strict=True):
        assert np.abs(np.asarray(left) - np.asarray(right)).max() < 5e-4, left.path


def test_vgg16_trains_in_two_stages_and_the_cache_changes_nothing(
    train_split: Split, validation_split: Split, vgg16_features: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways from the same seed: frozen blocks run once per image, and every image through every layer."""
    few, held_out = first(train_split, 64), first(validation_split, 32)
    recipe = TINY_VGG16.with_overrides({"stages.head.epochs": 1, "stages.top.epochs": 1})
    # XLA draws other dropouts from the same seed, so neither is compiled.
    monkeypatch.setattr(kernels, "worth_compiling", lambda *_: False)
    cached = train(recipe, few, held_out, Weights("random"), features=vgg16_features)
    end_to_end(monkeypatch)
    whole = train(recipe, few, held_out, Weights("random"))
    assert [stage.cached_from for stage in cached.stages] == ["flatten", "block4_pool"]
    assert [stage.cached_from for stage in whole.stages] == [None, None]
    assert [stage.name for stage in cached.stages] == [stage.name for stage in whole.stages] == ["head", "top"]
    assert [s.trainable_parameters for s in cached.stages] == [s.trainable_parameters for s in whole.stages]
    alike(cached, whole)


def test_vgg16_compiled_trains_as_it_does_uncompiled(
    train_split: Split, validation_split: Split, vgg16_features: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a rate that moves the weights by several times what may differ.
    top = TINY_VGG16.stages[1].model_copy(update={"epochs": 1, "learning_rate": 0.001})
    recipe = TINY_VGG16.with_overrides({"model.dropout": 0.0}).model_copy(update={"stages": (top,)})
    asked = recipe, first(train_split, 64), first(validation_split, 32), Weights("random")
    compiled = train(*asked, features=vgg16_features)
    monkeypatch.setattr(kernels, "worth_compiling", lambda *_: False)
    alike(compiled, train(*asked, features=vgg16_features))


def test_only_what_a_recipe_unfreezes_learns(tiny_vgg16: TrainedModel) -> None:
    keras.utils.set_random_seed(TINY_VGG16.seed)
    before = build(TINY_VGG16.model, Weights("random"))
    changed = {
        old.path
        for old, new in zip(before.weights, tiny_vgg16.model.weights, strict=True)
        if not np.array_equal(old, new)
    }
    learned = ("block5_conv1", "block5_conv2", "block5_conv3", "dense", "probabilities")
    assert changed == {f"{name}/{kind}" for name in learned for kind in ("kernel", "bias")}
    head, top = tiny_vgg16.stages
    assert [head.learning_rate, top.learning_rate] == [0.003, 0.0001]
    assert top.trainable_parameters - head.trainable_parameters == 3 * (3 * 3 * 512 * 512 + 512)
    assert tiny_vgg16.weights == "RANDOM WEIGHTS"


def gradients(what: Trainable, state: list[np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the first training batch, from the given state of the model and its dropouts."""
    assign(what.model.variables, state)
    inputs, labels = what.train[0]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, what.network(inputs, training=True)))
    variables = what.network.trainable_variables
    found = tape.gradient(loss, [variable.value for variable in variables])
    return float(loss), {variable.path: np.asarray(slope) for variable, slope in zip(variables, found, strict=True)}


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_behind_a_frozen_front_are_those_of_the_whole_model(
    stage: int,
    train_split: Split,
    validation_split: Split,
    vgg16_features: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keras.utils.set_random_seed(TINY_VGG16.seed)
    model = build(TINY_VGG16.model, Weights("random"))
    data = first(train_split, 64), first(validation_split, 32)
    run = fit._Run(model, TINY_VGG16, *data, vgg16_features)
    state = read(model.variables)
    loss, cached = gradients(run.prepare(TINY_VGG16.stages[stage]), state)
    end_to_end(monkeypatch)
    other_loss, whole = gradients(run.prepare(TINY_VGG16.stages[stage]), state)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert cached.keys() == whole.keys()
    assert len(cached) == (4 if stage == 0 else 10)
    for path, slope in cached.items():
        assert np.abs(slope).max() > 0, path
        assert np.abs(slope - whole[path]).max() <= 1e-4 * np.abs(whole[path]).max(), path


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"augmentation": {"flip": True, "shift": 3, "cutout": 8, "views": 2}}, id="views"),
        pytest.param({"label_smoothing": 0.1, "weight_averaging": 0.5}, id="soft labels and a mean of weights"),
    ],
)
def test_a_baseline_with_a_frozen_front_trains_as_end_to_end(
    changes: dict[str, Any],
    train_split: Split,
    validation_split: Split,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Normalisation in the front keeps its statistics; dropout behind it drops the same; each epoch has its view."""
    recipe = BASELINE.with_overrides(
        {"stages.fit.epochs": 3, "stages.fit.unfreeze_from": "block2_conv1", "optimizer.name": "sgd"} | changes
    )
    data = first(train_split, 96), first(validation_split, 40)
    cached = train(recipe, *data, features=FeatureCache(tmp_path, 2**30))
    made = {path.name for path in tmp_path.iterdir()}
    assert len(made) == 1 + max(recipe.augmentation.views, 1)
    end_to_end(monkeypatch)
    whole = train(recipe, *data)
    assert [cached.stages[0].cached_from, whole.stages[0].cached_from] == ["block1_pool", None]
    for left, right in zip(figures(cached)[0], figures(whole)[0], strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    for left, right in zip(cached.model.weights, whole.model.weights, strict=True):
        assert np.allclose(left, right, atol=1e-4), left.path


def test_only_a_front_that_is_the_same_in_every_epoch_is_cached(train_split: Split, tmp_path: Path) -> None:
    def cut(unfreeze_from: str | None, **augmentation: object) -> str | None:
        recipe = BASELINE.with_overrides(
            {"stages.fit.unfreeze_from": unfreeze_from, "augmentation": augmentation or None}
        )
        data = first(train_split, 32)
        run = fit._Run(build(recipe.model), recipe, data, data, FeatureCache(tmp_path, 2**30))
        at = run._cut(recipe.stages[0])
        return run._steps[at - 1].name if at else None

    assert cut(None) is None
    assert cut("block1_conv1") is None, "nothing that learns is in front of it"
    assert cut("block1_norm1") == "block1_conv1"
    assert cut("block2_conv1") == "block1_pool", "a dropout draws anew"
    assert cut("dense") == "block1_pool"
    assert cut("dense", flip=True) is None
    assert cut("dense", mixup=0.2) is None
    assert cut("dense", flip=True, views=1) == "block1_pool"


@pytest.mark.parametrize(
    ("precision", "filters"),
    [("mixed_bfloat16", [8, 8]), ("mixed_float16", [8])],  # processors compute float16 slowly
)
def test_mixed_precision_trains_averages_and_gives_a_model_in_float32(
    precision: str, filters: list[int], train_split: Split, validation_split: Split
) -> None:
    recipe = BASELINE.with_overrides(
        {"precision": precision, "weight_averaging": 0.5, "stages.fit.epochs": 3, "model.filters": filters}
    )
    trained = train(recipe, train_split, validation_split)
    assert keras.config.dtype_policy().name == "float32"
    assert {layer.dtype_policy.name for layer in trained.model.layers} == {"float32"}
    (stage,) = trained.stages
    assert stage.epochs[stage.kept_epoch]["val_accuracy"] > 0.5
    assert stage.epochs[-1]["loss"] < stage.epochs[0]["loss"]
    # Computed in another precision, the kept weights give nearly what was measured.
    assert loss_on(trained.model, validation_split) == pytest.approx(
        stage.epochs[stage.kept_epoch]["val_loss"], rel=0.1
    )


@pytest.mark.parametrize("views", [0, 2])
def test_every_epoch_has_its_own_order_and_its_own_draws_or_its_view(
    views: int, train_split: Split, validation_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    read_batch = Batches.__getitem__

    def recorded(batches: Batches, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        inputs, labels = read_batch(batches, index)
        if batches.num_batches == 2:  # the training's
            seen.append((batches.epoch, inputs["index"], inputs["flip"]))
        return inputs, labels

    monkeypatch.setattr(Batches, "__getitem__", recorded)
    recipe = BASELINE.with_overrides({"augmentation": {"flip": True, "views": views}, "stages.fit.epochs": 3})
    train(recipe, first(train_split, 64), first(validation_split, 20))
    _peek, *read_in_turn = seen
    assert [epoch for epoch, _, _ in read_in_turn] == [0, 0, 1, 1, 2, 2]
    orders, flips = [], []
    for epoch in range(3):
        index, flip = (np.concatenate([part[i] for part in read_in_turn if part[0] == epoch]) for i in (1, 2))
        assert sorted(index) == list(range(64))
        orders.append(index.tolist())
        flips.append(flip[np.argsort(index)].tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert flips[0] != flips[1]
    assert (flips[0] == flips[2]) == bool(views)


def test_a_chain_is_told_from_what_is_none() -> None:
    model = build(BASELINE.model)
    assert [step.name for step in chain_of(model)][:3] == ["to_0_1", "block1_conv1", "block1_norm1"]
    fork = keras.layers.Add()(
        [model.get_layer("block1_pool").output, model.get_layer("block1_conv1").output[:, ::2, ::2]]
    )
    with pytest.raises(ValueError, match="not a chain"):
        chain_of(keras.Model(model.inputs, fork))


def test_images_are_enlarged_inside_the_model() -> None:
    model = build(Vgg16Spec(input_size=64, dense_units=8), Weights("random"))
    assert model.input_shape == (None, 32, 32, 3)
    assert model.get_layer("block1_conv1").output.shape == (None, 64, 64, 64)
    assert model.get_layer("flatten").output.shape == (None, 2048)


def test_batches_cover_every_image_once_and_follow_the_seed() -> None:
    labels = np.arange(10)

    def make(index: np.ndarray, epoch: int, batch: int) -> dict[str, np.ndarray]:
        return {"index": index, "of": np.full(len(index), 100 * epoch + batch)}

    batches = Batches(labels, 4, make, seed=1)
    assert batches.num_batches == 3
    orders = []
    for epoch in (0, 1, 0):
        batches.epoch = epoch
        parts = [batches[i] for i in range(3)]
        assert all(np.array_equal(x["index"], y) for x, y in parts)
        assert [set(x["of"]) for x, _ in parts] == [{100 * epoch}, {100 * epoch + 1}, {100 * epoch + 2}]
        assert [len(y) for _, y in parts] == [4, 4, 2]
        orders.append(np.concatenate([y for _, y in parts]))
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], orders[2]), "an epoch's order depends on nothing but its number"
    assert not np.array_equal(Batches(labels, 10, make, seed=2)[0][1], Batches(labels, 10, make, seed=1)[0][1])
    assert np.array_equal(Batches(labels, 4, make)[0][1], [0, 1, 2, 3])
    soft = Batches(labels, 4, make, soft=True)[0][1]
    assert (soft.dtype, soft.shape) == (np.float32, (4, 10))
