"""A training that was cut off and resumed ends with the very weights and figures of one that was not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.errors import TrainingError
from ml.models.vgg16_weights import Weights
from ml.training.checkpoint import Checkpoint, Position
from ml.training.feature_cache import FeatureCache
from ml.training.fit import TrainedModel, train
from ml.training.recipe import Recipe
from tests.model.conftest import BASELINE, TINY_VGG16, figures, first

SMALL = BASELINE.with_overrides({"model.filters": [8]})
STAGES = [
    {"name": "fit", "epochs": 3, "learning_rate": 0.02, "schedule": "cosine", "warmup_epochs": 1.0},
    {"name": "head", "epochs": 2, "learning_rate": 0.005, "unfreeze_from": "dense", "layer_decay": 0.5},
]
MANY = {
    "augmentation": {"flip": True, "shift": 2, "cutout": 6, "mixup": 0.2, "cutmix": 1.0},
    "label_smoothing": 0.1,
    "weight_averaging": 0.8,
    "optimizer": {"name": "adamw", "weight_decay": 0.05},
    "model.dropout": 0.4,
    "stages": STAGES,
}
VIEWS = {
    "augmentation": {"flip": True, "views": 2},
    "optimizer": {"name": "sgd"},
    "early_stopping": 1,
    "stages": STAGES,
}


class CutOffError(Exception):
    pass


class CuttingOff(Checkpoint):
    """Ends the training as soon as it has been saved so many times; 0 never."""

    saves = 0

    def save(self, position: Position) -> None:
        super().save(position)
        self.saves -= 1
        if self.saves == 0:
            raise CutOffError


def same(one: TrainedModel, other: TrainedModel) -> None:
    assert figures(one) == figures(other)
    assert [stage.kept_epoch for stage in one.stages] == [stage.kept_epoch for stage in other.stages]
    for left, right in zip(one.model.weights, other.model.weights, strict=True):
        assert np.array_equal(left, right), left.path


def piecewise(recipe: Recipe, *data: Any, folder: Path, pieces: list[int], **more: Any) -> TrainedModel:
    """Trains, cut off after each of `pieces` more saves; the last piece ends the training."""
    checkpoint = CuttingOff(folder, {})
    for saves in pieces:
        checkpoint.saves = saves
        with pytest.raises(CutOffError):
            train(recipe, *data, checkpoint=checkpoint, position=checkpoint.load(), **more)
    checkpoint.saves = 0
    return train(recipe, *data, checkpoint=checkpoint, position=checkpoint.load(), **more)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        # Saves: three epochs, the stage's end, two epochs, the stage's end.
        pytest.param(MANY, [2, 2, 1], id="everything"),
        pytest.param(MANY | {"keep_best_epoch": False}, [3, 3], id="the mean of the last weights"),
        pytest.param(VIEWS, [2, 2], id="views, momentum, early stopping"),
        # Keras wraps the optimizer: its scale of the loss is a part of where the training stands. So is the mean of
        # the last weights, which the last piece has from the checkpoint alone: no epoch is left to it.
        pytest.param(
            {"precision": "mixed_float16", "weight_averaging": 0.5, "keep_best_epoch": False},
            [1, 1],
            id="loss scaling, the mean of the last weights",
        ),
    ],
)
def test_a_resumed_training_is_the_same_training(
    changes: dict[str, Any],
    pieces: list[int],
    train_split: Split,
    validation_split: Split,
    tmp_path: Path,
) -> None:
    recipe = SMALL.with_overrides(changes)
    data = first(train_split, 96), first(validation_split, 40)
    whole = train(recipe, *data)
    same(piecewise(recipe, *data, folder=tmp_path, pieces=pieces), whole)


def test_vgg16_goes_on_between_its_stages_and_within_the_second(
    tiny_vgg16: TrainedModel,
    train_split: Split,
    validation_split: Split,
    vgg16_features: FeatureCache,
    tmp_path: Path,
) -> None:
    resumed = piecewise(
        *(TINY_VGG16, first(train_split, 64), first(validation_split, 32), Weights("random")),
        folder=tmp_path,
        pieces=[3, 1],  # at the end of the head, then after the first epoch of the top
        features=vgg16_features,
    )
    same(resumed, tiny_vgg16)


def test_a_mean_of_weights_on_cached_features_goes_on_too(
    tiny_vgg16: TrainedModel,
    train_split: Split,
    validation_split: Split,
    vgg16_features: FeatureCache,
    tmp_path: Path,
) -> None:
    """Compiled, as the head is: averaged in one program, and swapped in from outside of it."""
    recipe = TINY_VGG16.with_overrides({"weight_averaging": 0.8}).model_copy(update={"stages": TINY_VGG16.stages[:1]})
    data = first(train_split, 64), first(validation_split, 32), Weights("random")
    whole = train(recipe, *data, features=vgg16_features)
    same(piecewise(recipe, *data, folder=tmp_path, pieces=[1], features=vgg16_features), whole)
    for mean, plain in zip(figures(whole)[0], figures(tiny_vgg16)[0], strict=True):
        assert mean["loss"] == pytest.approx(plain["loss"], rel=1e-4), "it learns as without"
        assert mean["val_loss"] != pytest.approx(plain["val_loss"], rel=1e-3), "it is the mean that is measured"


def test_an_early_stop_that_was_cut_off_stays_one(train_split: Split, validation_split: Split, tmp_path: Path) -> None:
    recipe = SMALL.with_overrides({"stages.fit.epochs": 9, "stages.fit.learning_rate": 3.0, "early_stopping": 1})
    data = first(train_split, 96), first(validation_split, 40)
    whole = train(recipe, *data)
    epochs = len(whole.stages[0].epochs)
    assert epochs < 9
    told: list[int] = []
    again = piecewise(
        recipe, *data, folder=tmp_path, pieces=[epochs], on_epoch=lambda _stage, epoch, _figures: told.append(epoch)
    )
    same(again, whole)
    assert told == list(range(epochs - 1)), "the last was saved, and then it was cut off"


def test_a_position_of_another_model_is_refused(train_split: Split, validation_split: Split, tmp_path: Path) -> None:
    data = first(train_split, 64), first(validation_split, 20)
    checkpoint = CuttingOff(tmp_path, {})
    checkpoint.saves = 1
    with pytest.raises(CutOffError):
        train(SMALL, *data, checkpoint=checkpoint)
    other = SMALL.with_overrides({"model.dense_units": 7})
    with pytest.raises(TrainingError, match="do not fit"):
        train(other, *data, position=checkpoint.load())
