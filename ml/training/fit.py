"""From a recipe and two splits to a trained model with its history. Where data come from and go is the workflow's."""

import logging
import time
from dataclasses import dataclass
from functools import partial

import keras

from ml.datasets.manifest import Split
from ml.models.catalog import build
from ml.models.vgg16_weights import Weights
from ml.training.augmentation import augment
from ml.training.fine_tuning import fine_tune
from ml.training.recipe import BaselineRecipe, Recipe
from ml.training.runtime import prepare
from ml.training.stages import Labelled, OnEpoch, StageHistory, run_stage

logger = logging.getLogger(__name__)

BASELINE_STAGE = "fit"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model (raw RGB 0-255 -> ten probabilities), what made it, and how that went."""

    model: keras.Model
    recipe: Recipe
    weights: str
    """What it started from: "from scratch", or the label of VGG16's weights (RANDOM WEIGHTS where they are)."""
    stages: tuple[StageHistory, ...]
    seconds: float
    """Of everything from building to the last epoch."""


def train(
    recipe: Recipe,
    train_split: Split,
    validation_split: Split,
    weights: Weights | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainedModel:
    """Trains one model. The same recipe, data and machine give the same model.

    Args:
        recipe: the baseline's or VGG16's.
        train_split: what is learned from; already limited if the recipe says so.
        validation_split: watched after each epoch.
        weights: of VGG16's base (`resolve_weights`); None for the baseline.
        on_epoch: told each epoch's figures while the training runs.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
        SourceError: the weights' file does not fit.
        ConfigurationError: weights and architecture do not go together.
    """
    began = time.monotonic()
    prepare(recipe.seed)
    train_data = Labelled(train_split.images, train_split.labels)
    validation = Labelled(validation_split.images, validation_split.labels)
    model = build(recipe.model, weights)
    label = weights.label if weights else "from scratch"
    logger.info("%s, recipe %s: %s weights", recipe.architecture, recipe.name, label)
    if isinstance(recipe, BaselineRecipe):
        stages: tuple[StageHistory, ...] = (
            run_stage(
                model,
                BASELINE_STAGE,
                recipe,
                train_data,
                validation,
                epochs=recipe.epochs,
                learning_rate=recipe.learning_rate,
                augment=partial(augment, flip=recipe.flip, shift=recipe.shift) if recipe.augments else None,
                on_epoch=on_epoch,
            ),
        )
    else:
        stages = fine_tune(model, recipe, train_data, validation, on_epoch)
    return TrainedModel(model, recipe, label, stages, time.monotonic() - began)
