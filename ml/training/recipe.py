"""Recipes: every choice of a training run, frozen and checked, read from `recipes/<architecture>/<name>.toml`.

Owns what a run may be asked for; leaves how it is done to `fit`. Imports no TensorFlow, so that a command or a DAG can
refuse a bad recipe at once.
"""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ml.errors import ConfigurationError
from ml.models.specs import ARCHITECTURES, BaselineSpec, Vgg16BaseSpec, Vgg16Spec
from ml.settings import PROJECT_ROOT
from ml.toml_files import nearest, read_toml

RECIPES_DIR = PROJECT_ROOT / "recipes"
PRETRAINING_RECIPE = RECIPES_DIR / "pretraining" / "vgg16.toml"

Limit = Annotated[int, Field(ge=10)] | None
Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Optimizer(BaseModel):
    """How gradients become steps. Its learning rate belongs to the stage."""

    model_config = _STRICT

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """`sgd` is with Nesterov's momentum."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `sgd`; the two Adams keep their 0.9 and 0.999."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decoupled (Loshchilov & Hutter 2019): a step takes rate x this of each kernel; biases and norms are spared."""

    @model_validator(mode="after")
    def _decay_needs_adamw(self) -> Self:
        if self.name == "adam" and self.weight_decay:
            raise ValueError('weight_decay is decoupled here: with it, name = "adamw"')
        return self


class Augmentation(BaseModel):
    """What is done to training images, anew each epoch or in `views` fixed ways (`ml.training.augmentation`)."""

    model_config = _STRICT

    flip: bool = False
    """Mirror half of the images left to right."""
    shift: int = Field(default=0, ge=0, le=16)
    """Move each image by up to this many pixels each way; its own reflection fills the edge."""
    cutout: int = Field(default=0, ge=0, le=32)
    """Side in pixels of a square of middle grey at a random place (DeVries & Taylor 2017)."""
    mixup: float = Field(default=0.0, ge=0, le=10)
    """Alpha of Beta(alpha, alpha), the share of a second image that is blended in (Zhang et al. 2018)."""
    cutmix: float = Field(default=0.0, ge=0, le=10)
    """Alpha likewise, of the area pasted in from a second image (Yun et al. 2019). With both, a batch draws one."""
    views: int = Field(default=0, ge=0, le=64)
    """0: drawn anew in each epoch. K: each image has K fixed views, used in turn, so that a frozen prefix of the model
    runs K times per image and not once per epoch."""

    @property
    def mixes(self) -> bool:
        """Whether a training image is made of two, so that its label is too."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_images(self) -> bool:
        """Whether an image looks different from one epoch to the next."""
        return self.flip or self.shift > 0 or self.cutout > 0 or self.mixes

    @model_validator(mode="after")
    def _views_of_something(self) -> Self:
        if self.views and not self.changes_images:
            raise ValueError("views need an augmentation to be views of: set flip, shift or cutout")
        if self.views and self.mixes:
            raise ValueError("views are of one image each: mixup and cutmix need views = 0")
        return self


class Stage(BaseModel):
    """A part of the training with its own rate, and its own choice of what learns."""

    model_config = _STRICT

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, le=10)
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` lets the rate fall to nought over the stage (Loshchilov & Hutter 2017, without restarts)."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Over so many epochs, of this stage's, the rate first rises from nought in a straight line (Goyal et al. 2017)."""
    unfreeze_from: str | None = None
    """This layer and all behind it learn; None is the whole model."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Discriminative rates (Howard & Ruder 2018): each layer with weights learns at this times the rate of the next."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        return self


class _Recipe(BaseModel):
    model_config = _STRICT

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    batch_size: int = Field(64, ge=1, le=4096)
    precision: Precision = "float32"
    """What the layers compute in while training; weights stay float32, and so does the model that is saved."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label spread evenly over the classes (Szegedy et al. 2016)."""
    weight_averaging: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of an exponential mean of the weights, which is then what is measured and kept; 0 is none."""
    keep_best_epoch: bool = True
    """Each stage ends with the weights of its epoch of least validation loss; else with its last."""
    early_stopping: int | None = Field(default=None, ge=1)
    """A stage ends after so many epochs in a row without a lower validation loss; None: it runs them all."""
    optimizer: Optimizer = Optimizer()
    augmentation: Augmentation = Augmentation()
    stages: tuple[Stage, ...] = Field(min_length=1, strict=False)
    train_limit: Limit = None
    """Train on a stratified subset of this size; None is the whole split. Likewise for the other splits."""
    validation_limit: Limit = None
    test_limit: Limit = None
    corrupted_limit: Limit = None
    """Measure CIFAR-10-C too, on so many test images in each of its 75 cells; None: not at all."""

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"every stage needs a name of its own, and there are {', '.join(names)}")
        known = self.model.learning_layers  # type: ignore[attr-defined]  # of the two kinds below
        for stage in self.stages:
            if stage.unfreeze_from is not None and stage.unfreeze_from not in known:
                raise ValueError(
                    f"stages.{stage.name}.unfreeze_from = {stage.unfreeze_from!r}: there is no such layer with weights"
                    f"{nearest(stage.unfreeze_from, known)}; there are {', '.join(known)}"
                )
        if self.train_limit is not None and self.batch_size > self.train_limit:
            raise ValueError(f"batch_size ({self.batch_size}) is larger than train_limit ({self.train_limit})")
        return self

    @property
    def epochs_in_all(self) -> int:
        """Of all stages together, early stopping aside."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def digest(self) -> str:
        """12 hex digits of everything in it but the seed: what repeated runs of one recipe share."""
        content = json.dumps(self.model_dump(mode="json", exclude={"seed"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def with_overrides(self, overrides: Mapping[str, object]) -> Self:
        """The same recipe with some values replaced.

        Args:
            overrides: by dotted key, a stage by its name: {"seed": 3, "stages.fit.learning_rate": 0.01}. None means
                "as it is", so a form's blanks pass through.

        Raises:
            ConfigurationError: an unknown key or an impossible value.
        """
        origin = f"the overrides of recipe {self.name!r}"
        content = self.model_dump(mode="json")
        for key, value in overrides.items():
            if value is not None:
                _replace(content, key, deepcopy(value), origin)
        recipe = parse_recipe(content, origin=origin)
        if type(recipe) is not type(self):
            raise ConfigurationError(
                "An override cannot change a recipe's architecture.", fix="load the other architecture's recipe."
            )
        return recipe


class BaselineRecipe(_Recipe):
    """A run of the baseline CNN."""

    architecture: Literal["baseline"] = "baseline"
    model: BaselineSpec = BaselineSpec()


class Vgg16Recipe(_Recipe):
    """A run of VGG16 from the weights that the setting VGG16_WEIGHTS names."""

    architecture: Literal["vgg16"] = "vgg16"
    model: Vgg16Spec = Vgg16Spec()


class Vgg16BaseRecipe(_Recipe):
    """A pretraining of VGG16's base from nothing. It ends in a file of weights, not in a candidate."""

    architecture: Literal["vgg16_base"] = "vgg16_base"
    model: Vgg16BaseSpec = Vgg16BaseSpec()


Recipe = BaselineRecipe | Vgg16Recipe | Vgg16BaseRecipe
_KINDS: dict[str, type[Recipe]] = {
    "baseline": BaselineRecipe,
    "vgg16": Vgg16Recipe,
    "vgg16_base": Vgg16BaseRecipe,
}
_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="architecture")])


def available_recipes(architecture: str, folder: Path = RECIPES_DIR) -> list[str]:
    """Names that `load_recipe` knows for this architecture, sorted."""
    return sorted(path.stem for path in (folder / architecture).glob("*.toml"))


def load_recipe(architecture: str, name: str, folder: Path = RECIPES_DIR) -> Recipe:
    """Reads and checks one recipe.

    Raises:
        ConfigurationError: no such architecture or recipe, not TOML, an unknown key, or an impossible value.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigurationError(
            f"There is no architecture {architecture!r}{nearest(architecture, ARCHITECTURES)}.",
            fix=f"use one of {', '.join(ARCHITECTURES)}.",
        )
    known = available_recipes(architecture, folder)
    if name not in known:
        raise ConfigurationError(
            f"There is no recipe {name!r} for {architecture}{nearest(name, known)}.",
            fix=f"use one of {', '.join(known) or '(none)'}, or add {folder / architecture / (name + '.toml')}.",
        )
    path = folder / architecture / f"{name}.toml"
    content = read_toml(path)
    if content.get("architecture") != architecture or content.get("name") != name:
        raise ConfigurationError(
            f"{path} calls itself {content.get('name')!r} of architecture {content.get('architecture')!r}.",
            fix=f"write name = {name!r} and architecture = {architecture!r} at its top, or move the file.",
        )
    return parse_recipe(content, origin=str(path))


def parse_recipe(content: Mapping[str, Any], *, origin: str) -> Recipe:
    """Checks plain values (of TOML, JSON or a form) and freezes them. `origin` names them in errors.

    Raises:
        ConfigurationError: names every offending key, and for an unknown one the nearest that exists.
    """
    try:
        return _RECIPE.validate_python(content)
    except ValidationError as error:
        items = error.errors()
        # A faulty stage is dropped, after which pydantic finds too few of them: that is no second fault.
        real = [item for item in items if item["type"] != "too_short" or len(items) == 1]
        wrong = "; ".join(_explain(item, str(content.get("architecture"))) for item in real)
        raise ConfigurationError(
            f"{origin} cannot be used: {wrong}.",
            fix="correct these values; ml/training/recipe.py says what each means.",
        ) from error


def refuse_unless_it_fits(recipe: Recipe, train_images: int) -> None:
    """Sees that the recipe can work on a training split of so many images.

    Raises:
        ConfigurationError: a batch is larger than the data.
    """
    train_images = min(recipe.train_limit or train_images, train_images)
    if recipe.batch_size > train_images:
        raise ConfigurationError(
            f"Recipe {recipe.name!r} takes batches of {recipe.batch_size}, and there are {train_images} training "
            "images.",
            fix="lower its batch_size, or train on more images.",
        )


def _replace(content: dict[str, Any], key: str, value: object, origin: str) -> None:
    """Sets one dotted key of a recipe's plain values."""
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        inside = _entries(place)
        if place is content.get("stages") and part not in inside:
            raise ConfigurationError(
                f"{origin}: there is no stage {part!r}{nearest(part, list(inside))}.",
                fix=f"use one of {', '.join(inside)}.",
            )
        if not isinstance(inside.get(part), dict | list):
            raise ConfigurationError(
                f"{origin}: unknown key {key!r}{nearest(part, list(inside))}.", fix="use a key of the recipe."
            )
        place = inside[part]
    if not isinstance(place, dict) or last not in place:
        raise ConfigurationError(
            f"{origin}: unknown key {key!r}{nearest(last, list(_entries(place)))}.", fix="use a key of the recipe."
        )
    place[last] = value


def _entries(place: Any) -> dict[str, Any]:
    """What a dotted key may go on to: a table's keys, or the stages by their names; nothing in a list of numbers."""
    if isinstance(place, dict):
        return place
    return {part["name"]: part for part in place if isinstance(part, dict) and isinstance(part.get("name"), str)}


_PARTS: dict[str, type[BaseModel]] = {"stages": Stage, "optimizer": Optimizer, "augmentation": Augmentation}


def _known_keys(architecture: str, location: list[str]) -> list[str]:
    """The keys that exist where an unknown one was found, then all others."""
    kind = _KINDS.get(architecture)
    if kind is None:
        return []
    parts = {"model": type(kind.model_fields["model"].default), **_PARTS}
    here = parts.get(location[0], kind) if len(location) > 1 else kind
    return [*here.model_fields, *kind.model_fields, *(key for part in parts.values() for key in part.model_fields)]


def _explain(item: Any, architecture: str) -> str:
    # The first part of the location is the architecture, which the discriminator puts there.
    location = [str(part) for part in item["loc"][1:]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(location[-1], _known_keys(architecture, location))}"
    if item["type"].startswith("union_tag"):
        return f"architecture must be one of {', '.join(_KINDS)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key} = {item['input']!r}: {item['msg']}" if key else item["msg"]
