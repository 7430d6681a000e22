"""Training: that it learns, repeats itself, stops when it diverges, and that cached features change nothing."""

import logging

import keras
import numpy as np
import pytest

from ml.datasets import synthetic
from ml.datasets.manifest import Split
from ml.errors import TrainingDiverged
from ml.models.catalog import build
from ml.models.specs import BaselineSpec
from ml.models.vgg16 import BASE_LAYERS, TOP_LAYERS
from ml.models.vgg16_weights import Weights
from ml.training import fine_tuning, progress
from ml.training.augmentation import augment
from ml.training.batches import Batches
from ml.training.feature_cache import extract, split_at
from ml.training.fit import TrainedModel, train
from ml.training.recipe import BaselineRecipe
from ml.training.stages import Labelled
from tests.model.conftest import TINY_VGG16, first

BASELINE = BaselineRecipe(
    name="tiny",
    epochs=2,
    learning_rate=0.01,
    batch_size=32,
    model=BaselineSpec(filters=(8, 8), dense_units=16, dropout=0.1, block_dropout=0.1, batch_norm_momentum=0.5),
)


def test_baseline_learns_and_repeats_itself(
    train_split: Split, validation_split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, float]] = []
    with caplog.at_level(logging.INFO, "ml"):
        first, second = (
            train(BASELINE, train_split, validation_split, on_epoch=lambda *a: told.append((a[0], a[1], a[2]["loss"])))
            for _ in range(2)
        )
    (stage,) = first.stages
    assert stage.epochs[stage.best_epoch]["val_accuracy"] > 0.5
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(stage.epochs[0])
    assert first.stages[0].epochs == second.stages[0].epochs
    for a, b in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        assert np.array_equal(a, b)
    assert told[:2] == [("fit", i, stage.epochs[i]["loss"]) for i in range(2)]
    assert "epoch 2/2 done" in caplog.text
    assert "images/s" in caplog.text
    other = train(BASELINE.with_overrides(seed=5), train_split, validation_split)
    assert other.stages[0].epochs != stage.epochs


def test_baseline_learns_the_stand_in() -> None:
    raw = synthetic.generate(train=1500, test=300, seed=3)
    spec = {"filters": [16, 32], "dense_units": 64, "dropout": 0.0, "block_dropout": 0.0, "batch_norm_momentum": 0.8}
    recipe = BASELINE.with_overrides(epochs=4, learning_rate=0.002, model=spec)
    trained = train(
        recipe,
        Split(raw.train_images, raw.train_labels, ("",) * 1500),
        Split(raw.test_images, raw.test_labels, ("",) * 300),
    )
    assert max(epoch["val_accuracy"] for epoch in trained.stages[0].epochs) > 0.25  # chance is 0.1


def test_the_best_epochs_weights_are_kept(train_split: Split, validation_split: Split) -> None:
    trained = train(BASELINE.with_overrides(epochs=4, learning_rate=0.05), train_split, validation_split)
    (stage,) = trained.stages
    model = trained.model
    loss, _ = model.evaluate(validation_split.images, validation_split.labels, batch_size=256, verbose=0)
    assert loss == pytest.approx(min(epoch["val_loss"] for epoch in stage.epochs), rel=1e-4)
    assert stage.epochs[stage.best_epoch]["val_loss"] == min(epoch["val_loss"] for epoch in stage.epochs)


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


def test_long_epochs_are_reported_within(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback = progress.Progress("fit", images=1000, batch_size=10, batches=100, epochs=2)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    with caplog.at_level(logging.INFO):
        for batch in range(20):
            now[0] += 1
            callback.on_train_batch_end(batch, {"loss": 1.5, "accuracy": 0.4})
    assert [record.getMessage() for record in caplog.records] == [
        f"fit: epoch 1/2, batch {n}/100: loss 1.500, accuracy 0.400; 10 images/s, about {200 - n} s left"
        for n in (5, 10, 15, 20)
    ]


def test_vgg16_trains_in_two_stages_and_the_cache_changes_nothing(
    tiny_vgg16: TrainedModel, train_split: Split, validation_split: Split
) -> None:
    """Both ways from the same seed: frozen blocks run once per image, and every image through every layer."""
    few, held_out, cached = first(train_split, 64), first(validation_split, 32), tiny_vgg16
    keras.utils.set_random_seed(TINY_VGG16.seed)
    model = build(TINY_VGG16.model, Weights("random"))
    before = {name: model.get_layer(name).get_weights() for name in BASE_LAYERS}
    whole = fine_tuning._end_to_end(
        model, TINY_VGG16, Labelled(few.images, few.labels), Labelled(held_out.images, held_out.labels), None
    )
    assert [stage.name for stage in cached.stages] == [stage.name for stage in whole] == ["head", "top"]
    for one, other in zip(cached.stages, whole, strict=True):
        assert one.trainable_parameters == other.trainable_parameters
        for left, right in zip(one.epochs, other.epochs, strict=True):
            assert left == pytest.approx(right, rel=2e-3, abs=1e-4)
    for layer in cached.model.layers:
        for left, right in zip(layer.get_weights(), model.get_layer(layer.name).get_weights(), strict=True):
            assert np.abs(left - right).max() < 5e-4, layer.name
    changed = {
        name
        for name, old in before.items()
        if old and not np.array_equal(old[0], cached.model.get_layer(name).get_weights()[0])
    }
    assert changed == {"block5_conv1", "block5_conv2", "block5_conv3"}
    assert [stage.learning_rate for stage in cached.stages] == [0.003, 0.0001]
    assert cached.weights == "RANDOM WEIGHTS"
    convolutions = 3 * (3 * 3 * 512 * 512 + 512)
    assert cached.stages[1].trainable_parameters - cached.stages[0].trainable_parameters == convolutions


def test_stages_unfreeze_exactly_the_top_four() -> None:
    model = build(TINY_VGG16.model, Weights("random"))
    fine_tuning.freeze_base(model)
    assert not any(model.get_layer(name).trainable for name in BASE_LAYERS)
    fine_tuning.unfreeze_top(model)
    assert {n for n in BASE_LAYERS if model.get_layer(n).trainable} == set(TOP_LAYERS)
    assert TOP_LAYERS == ("block5_conv1", "block5_conv2", "block5_conv3", "block5_pool")


def test_augmentation_sends_every_epoch_through_the_whole_model(
    train_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, str, bool]] = []

    def record(model: object, name: str, *_: object, augment: object, **__: object) -> None:
        asked.append((model, name, augment is not None))

    monkeypatch.setattr(fine_tuning, "run_stage", record)
    model = build(TINY_VGG16.model, Weights("random"))
    data = Labelled(train_split.images, train_split.labels)
    fine_tuning.fine_tune(model, TINY_VGG16.with_overrides(flip=True, shift=2), data, data)
    assert asked == [(model, "head", True), (model, "top", True)]


def test_a_cut_chain_computes_the_same(train_split: Split) -> None:
    keras.utils.set_random_seed(1)
    model = build(BASELINE.model)
    prefix, tail = split_at(model, "block1_pool")
    images = train_split.images[:70]
    features = extract(prefix, images, what="test", batch_size=32)
    assert features.dtype == np.float32
    assert np.allclose(tail.predict(features, verbose=0), model.predict(images, verbose=0), atol=1e-6)
    fork = keras.layers.Add()(
        [model.get_layer("block1_pool").output, model.get_layer("block1_conv1").output[:, ::2, ::2]]
    )
    with pytest.raises(ValueError, match="not a chain"):
        split_at(keras.Model(model.inputs, fork), "block1_pool")


def test_batches_cover_every_image_once_and_follow_the_seed() -> None:
    inputs, labels = np.arange(10, dtype=np.uint8)[:, None], np.arange(10)
    batches = Batches(inputs, labels, 4, seed=1)
    epochs = []
    for _ in range(2):
        parts = [batches[i] for i in range(batches.num_batches)]
        assert all(np.array_equal(x[:, 0], y) for x, y in parts)
        epochs.append(np.concatenate([y for _, y in parts]))
        batches.on_epoch_end()
    assert [len(y) for _, y in parts] == [4, 4, 2]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert not np.array_equal(*epochs)
    assert np.array_equal(np.concatenate([Batches(inputs, labels, 4, seed=1)[i][1] for i in range(3)]), epochs[0])
    assert np.array_equal(Batches(inputs, labels, 4)[0][1], [0, 1, 2, 3])
    with pytest.raises(ValueError, match="labels"):
        Batches(inputs, labels[:3], 4)


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    assert np.array_equal(augment(images, rng, flip=False, shift=0), images)
    flipped = augment(images, rng, flip=True, shift=0)
    mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, images, strict=True)]
    kept = [np.array_equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 60 < sum(mirrored) < 140
    moved = augment(images, rng, flip=False, shift=4)
    assert moved.dtype == np.uint8
    for new, old in zip(moved, images, strict=True):
        assert any(
            np.array_equal(new[4:-4, 4:-4], old[4 + dy : 28 + dy, 4 + dx : 28 + dx])
            for dy in range(-4, 5)
            for dx in range(-4, 5)
        )
