"""Recipes: every choice of a training run, frozen and checked, read from `recipes/<architecture>/<name>.toml`.

Owns what a run may be asked for; leaves how it is done to `fit` and `fine_tuning`. Imports no TensorFlow, so that
a command or a DAG can refuse a bad recipe at once.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ml.errors import ConfigurationError
from ml.models.specs import ARCHITECTURES, BaselineSpec, Vgg16Spec
from ml.settings import PROJECT_ROOT

RECIPES_DIR = PROJECT_ROOT / "recipes"

Limit = Annotated[int, Field(ge=10)] | None
Rate = Annotated[float, Field(gt=0, le=1)]


class _Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: int = Field(64, ge=1, le=4096)
    epochs: int = Field(ge=1)
    learning_rate: Rate
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` lets each stage's rate fall to nought over its steps (Loshchilov & Hutter 2017, without restarts)."""
    keep_best_epoch: bool = True
    """Each stage ends with the weights of its epoch of least validation loss."""
    flip: bool = False
    """Augmentation: mirror half of the training images, anew each epoch."""
    shift: int = Field(0, ge=0, le=8)
    """Augmentation: move each training image by up to this many pixels each way."""
    train_limit: Limit = None
    """Train on a stratified subset of this size; None is the whole split. Likewise for the other splits."""
    validation_limit: Limit = None
    test_limit: Limit = None

    @property
    def augments(self) -> bool:
        """Whether an image looks different from one epoch to the next."""
        return self.flip or self.shift > 0

    def with_overrides(self, **overrides: object) -> Self:
        """The same recipe with some top-level values replaced; None means "as it is", so a form's blanks pass through.

        Raises:
            ConfigurationError: an unknown key or an impossible value.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        recipe = parse_recipe({**self.model_dump(), **given}, origin=f"the overrides of recipe {self.name!r}")
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
    """A run of VGG16. `epochs` and `learning_rate` are stage 1's (head alone), `fine_tuning_*` stage 2's (block 5)."""

    architecture: Literal["vgg16"] = "vgg16"
    model: Vgg16Spec = Vgg16Spec()
    fine_tuning_epochs: int = Field(ge=0)
    fine_tuning_learning_rate: Rate

    @model_validator(mode="after")
    def _lower_rate(self) -> Self:
        if self.fine_tuning_learning_rate >= self.learning_rate:
            raise ValueError(
                f"fine_tuning_learning_rate ({self.fine_tuning_learning_rate}) must be below learning_rate "
                f"({self.learning_rate}): a high rate destroys the pre-trained layers"
            )
        return self


Recipe = BaselineRecipe | Vgg16Recipe
_KINDS: dict[str, type[BaselineRecipe] | type[Vgg16Recipe]] = {"baseline": BaselineRecipe, "vgg16": Vgg16Recipe}
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
            f"There is no architecture {architecture!r}{_nearest(architecture, ARCHITECTURES)}.",
            fix=f"use one of {', '.join(ARCHITECTURES)}.",
        )
    known = available_recipes(architecture, folder)
    if name not in known:
        raise ConfigurationError(
            f"There is no recipe {name!r} for {architecture}{_nearest(name, known)}.",
            fix=f"use one of {', '.join(known) or '(none)'}, or add {folder / architecture / (name + '.toml')}.",
        )
    path = folder / architecture / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}.", fix="correct the file.") from error
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
        known = _known_keys(str(content.get("architecture")))
        wrong = "; ".join(_explain(item, known) for item in error.errors())
        raise ConfigurationError(
            f"{origin} cannot be used: {wrong}.",
            fix="correct these values; ml/training/recipe.py says what each means.",
        ) from error


def _known_keys(architecture: str) -> list[str]:
    kind = _KINDS.get(architecture)
    if kind is None:
        return []
    return [*kind.model_fields, *kind.model_fields["model"].default.__class__.model_fields]


def _explain(item: Any, known: list[str]) -> str:
    # The first part of the location is the architecture, which the discriminator puts there.
    key = ".".join(str(part) for part in item["loc"][1:])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(str(item['loc'][-1]), known)}"
    if item["type"].startswith("union_tag"):
        return f"architecture must be one of {', '.join(ARCHITECTURES)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {item['input']!r}: {item['msg']}" if key else item["msg"]


def _nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
