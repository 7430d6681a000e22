"""From a recipe and two splits to a trained model with its history. Where data come from and go is the workflow's.

Each stage freezes what its recipe freezes. Where that leaves a frozen, deterministic front, and images look the same
whenever they come again, the front runs once per image (`feature_cache`) and the rest trains on what it gave; else
images run through the whole model.
"""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
from keras import layers

from ml.datasets.manifest import Split
from ml.models.catalog import build
from ml.models.chain import chain_of
from ml.models.vgg16_weights import Weights
from ml.training import batches, kernels, runtime
from ml.training.augmentation import AugmentedImages, Draws, draw, neutral
from ml.training.checkpoint import Checkpoint, Position, assign, read
from ml.training.feature_cache import FeatureCache, digest_of_array, digest_of_layers, key_of, progress
from ml.training.recipe import Augmentation, Recipe, Stage, refuse_unless_it_fits
from ml.training.runtime import prepare
from ml.training.stages import OnEpoch, StageHistory, Trainable, histories, run_stage, summaries

logger = logging.getLogger(__name__)

_EXTRACTION_BATCH = 256
_VALIDATION_BATCH = 256
_TEMPORARY_BUDGET = 16 * 2**30
_FEATURES_FORMAT = "1"
"""Another one with every change of how images are drawn or passed through, so that old features are not taken."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model (raw RGB 0-255 -> ten probabilities), what made it, and how that went."""

    model: keras.Model
    recipe: Recipe
    weights: str
    """What it started from: "from scratch", or the label of VGG16's weights (RANDOM WEIGHTS where they are)."""
    stages: tuple[StageHistory, ...]
    seconds: float
    """Of everything from building to the last epoch, in this process."""


def train(
    recipe: Recipe,
    train_split: Split,
    validation_split: Split,
    weights: Weights | None = None,
    *,
    on_epoch: OnEpoch | None = None,
    features: FeatureCache | None = None,
    checkpoint: Checkpoint | None = None,
    position: Position | None = None,
) -> TrainedModel:
    """Trains one model. The same recipe, data, machine and backend give the same model, bit for bit on a CPU; on an
    accelerator as far as the backend's kernels do.

    Args:
        recipe: the baseline's or VGG16's.
        train_split: what is learned from; already limited if the recipe says so.
        validation_split: watched after each epoch.
        weights: of VGG16's base (`resolve_weights`); None for the baseline.
        on_epoch: told each epoch's figures while the training runs.
        features: where outputs of frozen layers are kept; None is a folder that goes when the training ends.
        checkpoint: is given the training's position after each epoch.
        position: where to go on, as the checkpoint gave it; None is the start.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
        SourceError: the weights' file does not fit.
        ConfigurationError: weights and architecture do not go together; or the recipe cannot work on so many images.
        TrainingError: the position is not of this model.
        StorageError: features or a checkpoint could not be written.
    """
    began = time.monotonic()
    refuse_unless_it_fits(recipe, len(train_split.labels))
    prepare(recipe.seed)
    label = weights.label if weights else "from scratch"
    logger.info("%s, recipe %s: %s weights", recipe.architecture, recipe.name, label)
    with ExitStack() as stack:
        if features is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="features-"))
            features = FeatureCache(Path(folder), _TEMPORARY_BUDGET)
        keras.config.set_dtype_policy(recipe.precision)
        stack.callback(keras.config.set_dtype_policy, "float32")
        model = build(recipe.model, weights)
        run = _Run(model, recipe, train_split, validation_split, features)
        run.refuse_unless_features_fit()
        position = position or Position(run_id="")
        if position.model:
            assign(model.variables, position.model)
        done = list(histories(position.finished))
        for stage in recipe.stages[len(done) :]:
            done.append(
                run_stage(
                    stage,
                    recipe,
                    run.prepare(stage),
                    on_epoch=on_epoch,
                    position=position,
                    checkpoint=checkpoint,
                )
            )
            # The next stage starts from here, with moments of its own.
            position.finished, position.stage = summaries(done), len(done)
            position.epochs, position.seconds, position.optimizer, position.best = [], 0.0, [], []
            if checkpoint is not None:
                position.model = read(model.variables)
                checkpoint.save(position)
    return TrainedModel(_in_float32(model, recipe, weights), recipe, label, tuple(done), time.monotonic() - began)


class _Run:
    """What the stages of one training share: the model, the images, and the cuts that features are kept at."""

    def __init__(
        self, model: keras.Model, recipe: Recipe, train: Split, validation: Split, features: FeatureCache
    ) -> None:
        self._model, self._recipe, self._features = model, recipe, features
        self._train, self._validation = train, validation
        self._steps = chain_of(model)
        self._digests: dict[str, str] = {}
        # Deeper features are made of shallower ones, so that no image passes a layer twice.
        self._cuts = sorted({cut for stage in recipe.stages if (cut := self._cut(stage))})
        self._fronts: dict[tuple[int, str], keras.Model] = {}

    def refuse_unless_features_fit(self) -> None:
        """Raises ConfigurationError where a stage needs more features at one time than there may be."""
        views = max(self._recipe.augmentation.views, 1)
        for cut in self._cuts:
            size = 4 * int(np.prod(self._steps[cut - 1].output.shape[1:]))
            rows = views * len(self._train.labels) + len(self._validation.labels)
            self._features.refuse_unless_it_holds(size * rows)

    def prepare(self, stage: Stage) -> Trainable:
        """Freezes the layers and makes the network and the batches that the stage trains on."""
        self._freeze(stage)
        cut = self._cut(stage)
        # Epochs count through all stages, so that no stage repeats the order and the draws of another.
        stages = self._recipe.stages
        first_epoch = sum(earlier.epochs for earlier in stages[: stages.index(stage)])
        made = self._on_features(cut) if cut else self._on_images()
        self._fronts.clear()  # each holds a table of images
        return replace(made, first_epoch=first_epoch)

    def _freeze(self, stage: Stage) -> None:
        names = self._recipe.model.learning_layers
        first = 0 if stage.unfreeze_from is None else names.index(stage.unfreeze_from)
        for name in names:
            self._model.get_layer(name).trainable = names.index(name) >= first

    def _cut(self, stage: Stage) -> int:
        """How many layers from the image on are frozen, alike in every epoch and worth keeping; 0 for none."""
        augmentation = self._recipe.augmentation
        if stage.unfreeze_from is None or (augmentation.changes_images and not augmentation.views):
            return 0
        names = [step.name for step in self._steps]
        first = names.index(stage.unfreeze_from)
        # What a dropout leaves differs each time, so the front ends before the first that does anything.
        drops = (i for i, step in enumerate(self._steps[:first]) if isinstance(step, layers.Dropout) and step.rate)
        first = next(drops, first)
        learned = set(self._recipe.model.learning_layers)
        return first if learned & set(names[:first]) else 0

    @property
    def _soft(self) -> bool:
        return self._recipe.label_smoothing > 0 or self._recipe.augmentation.mixes

    def _on_images(self) -> Trainable:
        """Every image through every layer, in every epoch."""
        recipe, train, validation = self._recipe, self._train, self._validation
        side = train.images.shape[1]
        images = AugmentedImages(np.concatenate([train.images, validation.images]), recipe.augmentation.cutout)
        example = draw(recipe.augmentation, np.arange(2), side, np.random.default_rng(0))
        source = {key: keras.Input(value.shape[1:], dtype=str(value.dtype), name=key) for key, value in example.items()}
        output = kernels.follow(self._steps, images(source))
        count = len(train.labels)

        views = [self._view(train, recipe.augmentation, view) for view in range(recipe.augmentation.views)]

        def drawn(index: np.ndarray, epoch: int, batch: int) -> Draws:
            if views:
                return {key: values[index] for key, values in views[epoch % len(views)].items()}
            return draw(recipe.augmentation, index, side, np.random.default_rng([recipe.seed, epoch, batch]))

        def as_they_are(index: np.ndarray, _epoch: int, _batch: int) -> Draws:
            return neutral(example, index + count)

        return Trainable(
            network=kernels.model_class()(source, output, name=f"{self._model.name}_training"),
            model=self._model,
            train=batches.Batches(train.labels, recipe.batch_size, drawn, seed=recipe.seed, soft=self._soft),
            validation=batches.Batches(validation.labels, _VALIDATION_BATCH, as_they_are, soft=self._soft),
            images=count,
            soft_labels=self._soft,
            compile_with_xla=kernels.worth_compiling(self._steps, (None, side, side, 3)),
        )

    def _on_features(self, cut: int) -> Trainable:
        """The layers behind the cut, on what those before it gave for each image and view."""
        recipe = self._recipe
        views = max(recipe.augmentation.views, 1)
        shape = self._steps[cut - 1].output.shape
        train = [self._extract(cut, self._train, "training", view) for view in range(views)]
        validation = self._extract(cut, self._validation, "validation", None)
        tail = self._steps[cut:]
        source = keras.Input(shape[1:], name="features")
        return Trainable(
            network=kernels.model_class()(
                {"features": source}, kernels.follow(tail, source), name=f"{self._model.name}_tail_training"
            ),
            model=self._model,
            train=batches.Batches(
                self._train.labels, recipe.batch_size, _rows_of(train), seed=recipe.seed, soft=self._soft
            ),
            validation=batches.Batches(
                self._validation.labels, _VALIDATION_BATCH, _rows_of([validation]), soft=self._soft
            ),
            images=len(self._train.labels),
            soft_labels=self._soft,
            compile_with_xla=kernels.worth_compiling(tail, tuple(shape)),
            cached_from=self._steps[cut - 1].name,
        )

    def _extract(self, cut: int, split: Split, which: str, view: int | None) -> np.ndarray:
        """The outputs of the layers before the cut, float32 (m, ...), from the cache or made for it.

        view: which of the recipe's fixed views; None for the images as they are.
        """
        recipe = self._recipe
        augmentation = recipe.augmentation if view is not None and recipe.augmentation.views else Augmentation()
        drawn = f"{augmentation.model_dump_json(exclude={'views'})} seed {recipe.seed} view {view}"
        key = key_of(
            digest_of_layers(self._steps[:cut]),
            self._digest(which, split),
            drawn if augmentation.changes_images else "as they are",
            recipe.precision,
            runtime.computed_by(),
            _FEATURES_FORMAT,
        )
        shape = (len(split.labels), *self._steps[cut - 1].output.shape[1:])

        def fill(features: np.ndarray) -> None:
            before = max((c for c in self._cuts if c < cut), default=0)
            if before:
                given = self._extract(before, split, which, view)
                source = keras.Input(given.shape[1:], name="features")
                front = keras.Model(source, _chain(self._steps[before:cut], source))
            else:
                drawn_once = self._view(split, augmentation, view or 0)
                front = self._front(split, which, augmentation, cut)
            first, last = (self._steps[i].name for i in (before, cut - 1))
            with progress(f"{first} to {last}, frozen, {which} images", len(split.labels)) as tell:
                for start in range(0, len(split.labels), _EXTRACTION_BATCH):
                    rows = slice(start, start + _EXTRACTION_BATCH)
                    inputs = given[rows] if before else {key: values[rows] for key, values in drawn_once.items()}
                    features[rows] = front.predict_on_batch(inputs)
                    tell(start + _EXTRACTION_BATCH)

        return self._features.array(key, shape, fill)

    def _view(self, split: Split, augmentation: Augmentation, view: int) -> Draws:
        """What happens to each image of the split in this one of its fixed views."""
        parts = [
            draw(
                augmentation,
                np.arange(start, min(start + _EXTRACTION_BATCH, len(split.labels))),
                split.images.shape[1],
                np.random.default_rng([self._recipe.seed, view, start]),
            )
            for start in range(0, len(split.labels), _EXTRACTION_BATCH)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _front(self, split: Split, which: str, augmentation: Augmentation, cut: int) -> keras.Model:
        """Draws -> the outputs of the layers before the cut; one model for all views."""
        if (cut, which) in self._fronts:
            return self._fronts[cut, which]
        images = AugmentedImages(split.images, augmentation.cutout)
        example = draw(augmentation, np.arange(2), split.images.shape[1], np.random.default_rng(0))
        source = {key: keras.Input(value.shape[1:], dtype=str(value.dtype), name=key) for key, value in example.items()}
        self._fronts[cut, which] = keras.Model(source, _chain(self._steps[:cut], images(source)))
        return self._fronts[cut, which]

    def _digest(self, which: str, split: Split) -> str:
        if which not in self._digests:
            self._digests[which] = digest_of_array(split.images)
        return self._digests[which]


def _chain(steps: Sequence[layers.Layer], x: keras.KerasTensor) -> keras.KerasTensor:
    for layer in steps:
        x = layer(x)
    return x


def _rows_of(views: Sequence[np.ndarray]) -> batches.Make:
    """In epoch e the rows of view e modulo their number. views: float32 (m, ...) each, only read."""

    def make(index: np.ndarray, epoch: int, _batch: int) -> Draws:
        return {"features": views[epoch % len(views)][index]}

    return make


def _in_float32(model: keras.Model, recipe: Recipe, weights: Weights | None) -> keras.Model:
    """The trained model for everybody else. Its weights are float32 in any case; this is what it computes in."""
    if recipe.precision == "float32":
        return model
    same = build(recipe.model, weights)
    same.set_weights(model.get_weights())
    return same


def identity_of(
    recipe: Recipe, dataset_id: str, weights: Weights | None, backend: str, purpose: str
) -> Mapping[str, str]:
    """What a checkpoint must share with the training that resumes from it; `purpose`: what is made of its model."""
    return {
        "purpose": purpose,
        "recipe": recipe.digest,
        "seed": str(recipe.seed),
        "dataset": dataset_id,
        "weights": (weights.sha256 or weights.kind) if weights else "none",
        "backend": backend,
    }
