"""VGG16 in two stages: the new dense layers on a frozen base, then the top four layers of the base as well.

Stage 1 `head`: the base is frozen. Stage 2 `top`: block5_conv1..3 and block5_pool are unfrozen and training goes on
at a lower rate; a head trained first keeps the first large gradients away from the pre-trained layers. Blocks 1 to 4
never learn, so without augmentation they run once per image (`feature_cache`).
"""

import logging
from functools import partial

import keras

from ml.models.vgg16 import BASE_LAYERS, TOP_LAYERS
from ml.training.augmentation import augment
from ml.training.feature_cache import extract, split_at
from ml.training.recipe import Vgg16Recipe
from ml.training.stages import Labelled, OnEpoch, StageHistory, run_stage

logger = logging.getLogger(__name__)

HEAD, TOP = "head", "top"
FROZEN_END = BASE_LAYERS[-5]
"""block4_pool: the last layer that neither stage trains."""
BASE_END = "flatten"
"""The last layer that stage 1 does not train."""


def fine_tune(
    model: keras.Model, recipe: Vgg16Recipe, train: Labelled, validation: Labelled, on_epoch: OnEpoch | None = None
) -> tuple[StageHistory, ...]:
    """Trains a model of `build_vgg16` in place, and returns the figures of both stages.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
    """
    if recipe.augments:
        return _end_to_end(model, recipe, train, validation, on_epoch)
    freeze_base(model)
    prefix, rest = split_at(model, FROZEN_END)
    train, validation = _through(prefix, train, validation, what="frozen blocks 1 to 4")
    # Stage 1's features are made from stage 2's, so no image passes a layer twice.
    block5, head = split_at(rest, BASE_END)
    stages = [
        run_stage(
            head,
            HEAD,
            recipe,
            *_through(block5, train, validation, what="frozen block 5"),
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            on_epoch=on_epoch,
        )
    ]
    if recipe.fine_tuning_epochs:
        unfreeze_top(model)
        stages.append(
            run_stage(
                rest,
                TOP,
                recipe,
                train,
                validation,
                epochs=recipe.fine_tuning_epochs,
                learning_rate=recipe.fine_tuning_learning_rate,
                on_epoch=on_epoch,
            )
        )
    return tuple(stages)


def freeze_base(model: keras.Model) -> None:
    """Stage 1: no layer of the convolutional base learns."""
    for name in BASE_LAYERS:
        model.get_layer(name).trainable = False


def unfreeze_top(model: keras.Model) -> None:
    """Stage 2: block5_conv1..3 and block5_pool learn. It takes effect when the model is compiled anew."""
    for name in TOP_LAYERS:
        model.get_layer(name).trainable = True


def _through(prefix: keras.Model, train: Labelled, validation: Labelled, what: str) -> tuple[Labelled, Labelled]:
    return (
        Labelled(extract(prefix, train.inputs, what=f"{what}, training images"), train.labels),
        Labelled(extract(prefix, validation.inputs, what=f"{what}, validation images"), validation.labels),
    )


def _end_to_end(
    model: keras.Model, recipe: Vgg16Recipe, train: Labelled, validation: Labelled, on_epoch: OnEpoch | None
) -> tuple[StageHistory, ...]:
    """Both stages with every image passing every layer in every epoch, as augmentation needs."""
    change = partial(augment, flip=recipe.flip, shift=recipe.shift) if recipe.augments else None
    plan = [(HEAD, freeze_base, recipe.epochs, recipe.learning_rate)]
    if recipe.fine_tuning_epochs:
        plan.append((TOP, unfreeze_top, recipe.fine_tuning_epochs, recipe.fine_tuning_learning_rate))
    stages = []
    for name, prepare_layers, epochs, rate in plan:
        prepare_layers(model)
        stages.append(
            run_stage(
                model,
                name,
                recipe,
                train,
                validation,
                epochs=epochs,
                learning_rate=rate,
                augment=change,
                on_epoch=on_epoch,
            )
        )
    return tuple(stages)
