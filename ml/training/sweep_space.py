"""What a search may try: the `[sweep]` table of a recipe's file, held against the recipe that stands around it.

Owns the table's kinds and checks, the values at a space's edges, and how values become a recipe. Pure: who proposes the
values is `ml.training.study`'s business. Imports no TensorFlow, so that a bad space is refused at once.
"""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ml.errors import ConfigurationError
from ml.toml_files import nearest, read_toml
from ml.training.recipe import Recipe, parse_recipe

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Value = bool | int | float | str | list[Any]
"""What a recipe's key can hold, in TOML's kinds."""

NOT_SEARCHED = {
    "name": "it is the recipe's name",
    "architecture": "the recipe's other keys depend on it; search each architecture by a file of its own",
    "seed": "the best of several seeds is luck, not a better recipe",
    "train_limit": "more images are nearly always better; set it once, in the recipe",
    "validation_limit": "trials are compared on the same validation images",
    "test_limit": "a search never looks at the test split",
    "corrupted_limit": "a search never looks at the test split",
}
"""Keys of a recipe that a space may not have, and why."""

_MOST_CORNERS = 2048
_MOST_VALUES = 100


class Range(BaseModel):
    """Numbers from `low` to `high`, both included. Whole numbers where the recipe's key takes such."""

    model_config = _STRICT

    low: int | float
    high: int | float
    log: bool = False
    """Drawn evenly in the logarithm: for what spans magnitudes, as learning rates do."""
    step: int | float | None = Field(None, gt=0)
    """Only low, low + step, ... high; None: any number, or any whole one."""

    @model_validator(mode="after")
    def _spans_something(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"with log, low ({self.low}) must be above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together")
        if self.step is not None:
            steps = (self.high - self.low) / self.step
            if not math.isclose(steps, round(steps), rel_tol=0, abs_tol=1e-9):
                raise ValueError(f"high ({self.high}) is not reached from low ({self.low}) by steps of {self.step}")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return not any(isinstance(number, float) for number in (self.low, self.high, self.step))

    def like(self, held: object) -> "Range":
        """The same, in the kind of number that the recipe's key holds: 0 to 2 is a range of fractions for a fraction.

        Args:
            held: the recipe's own value.
        """
        if not isinstance(held, float) and self.whole:
            return self
        step = None if self.step is None else float(self.step)
        return Range(low=float(self.low), high=float(self.high), log=self.log, step=step)

    def extremes(self) -> tuple[Value, ...]:
        """Both ends."""
        return (self.low, self.high)

    def values(self) -> tuple[Value, ...]:
        """All of them, where they are whole numbers or steps, and not many; else the ends."""
        if self.step is None and not self.whole:
            return self.extremes()
        step = 1 if self.step is None else self.step
        count = round((self.high - self.low) / step) + 1
        return tuple(self.low + i * step for i in range(count)) if count <= _MOST_VALUES else self.extremes()

    def holds(self, value: object) -> bool:
        """Whether the value is one of the range's."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        step = 1 if self.whole and self.step is None else self.step
        if step is None:
            return self.low <= value <= self.high
        # Counted in steps: 0.7 + 0.1 is 0.7999999999999999, and 0.8 is that step all the same.
        steps, most = (value - self.low) / step, (self.high - self.low) / step
        return math.isclose(steps, round(steps), rel_tol=0, abs_tol=1e-9) and 0 <= round(steps) <= round(most)


class Choices(BaseModel):
    """Any of some values, of any kind that the recipe's key takes; they are in no order."""

    model_config = _STRICT

    choices: tuple[Value, ...] = Field(min_length=2, strict=False)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(set(self.labels)) < len(self.choices):
            raise ValueError(f"choices has a value twice: {', '.join(self.labels)}")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Each as JSON: lists too can then be told apart and kept."""
        return tuple(json.dumps(choice) for choice in self.choices)

    def like(self, held: object) -> "Choices":
        """The same; as `Range.like`."""
        if not isinstance(held, float):
            return self
        # A recipe reads 1 as 1.0 there, and only so it is recognised as the recipe's own value.
        whole = (isinstance(choice, int) and not isinstance(choice, bool) for choice in self.choices)
        pairs = zip(self.choices, whole, strict=True)
        return Choices(choices=tuple(float(choice) if is_whole else choice for choice, is_whole in pairs))  # type: ignore[arg-type]

    def extremes(self) -> tuple[Value, ...]:
        """All: none lies between the others."""
        return self.choices

    def values(self) -> tuple[Value, ...]:
        """All."""
        return self.choices

    def holds(self, value: object) -> bool:
        """Whether the value is one of the choices."""
        return json.dumps(value) in self.labels


def _kind(given: Any) -> str:
    return "choices" if isinstance(given, Choices) or (isinstance(given, Mapping) and "choices" in given) else "range"


Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(_kind),
]


class Pruner(BaseModel):
    """When a trial is given up: after an epoch at which its best validation accuracy so far is below the median of what
    the completed trials had at that epoch.
    """

    model_config = _STRICT

    startup_trials: int = Field(default=5, ge=1)
    """Before so many trials are complete, none is given up."""
    warmup_epochs: int = Field(default=1, ge=0)
    """Nor is one in its first so many epochs."""


def _dotted(space: object) -> object:
    """TOML reads a key without quotes, stages.fit.epochs, as tables within tables: here they are one key again."""
    if not isinstance(space, Mapping):
        return space
    keys: dict[str, object] = {}
    for key, held in space.items():
        within = isinstance(held, Mapping) and held and all(isinstance(inner, Mapping) for inner in held.values())
        keys |= {f"{key}.{rest}": inner for rest, inner in _dotted(held).items()} if within else {key: held}  # type: ignore[attr-defined]
    return keys


class _Table(BaseModel):
    """`[sweep]` as it is written."""

    model_config = _STRICT

    trials: int = Field(ge=1)
    timeout_minutes: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)
    random_trials: int = Field(10, ge=1)
    pruner: Pruner = Pruner()
    space: Annotated[dict[str, Dimension], BeforeValidator(_dotted)] = Field(min_length=1)


@dataclass(frozen=True)
class Sweep:
    """A recipe and the space around it in which a better one is looked for."""

    recipe: Recipe
    trials: int
    """How many to bring to an end, in all runs of the command together."""
    timeout_minutes: float | None
    """After so long, no further trial is begun; of one run of the command."""
    seed: int
    random_trials: int
    """So many are drawn at random before the search learns from them."""
    pruner: Pruner
    space: Mapping[str, Range | Choices]
    """By the recipe's dotted keys, a stage by its name."""

    def with_trials(self, trials: int | None) -> "Sweep":
        """The same with another number of trials; None means "as it is"."""
        return self if trials is None else replace(self, trials=trials)

    def recipe_for(self, values: Mapping[str, object]) -> Recipe:
        """The recipe with these values.

        Raises:
            ConfigurationError: they do not go together.
        """
        return self.recipe.with_overrides(values)

    @property
    def recipes_own_values(self) -> dict[str, Value] | None:
        """What the recipe itself has for the keys that are searched; None where one of them lies outside the space."""
        own = flat(self.recipe)
        values = {key: own[key] for key in self.space}
        return values if all(dimension.holds(values[key]) for key, dimension in self.space.items()) else None

    def digest(self, dataset_id: str) -> str:
        """12 hex digits of what makes trials comparable and proposals repeatable: recipe, space, data, seed, pruner.

        Not the number of trials nor the time: a search may be prolonged.
        """
        content = {
            "recipe": self.recipe.model_dump(mode="json"),
            "space": {key: dimension.model_dump(mode="json") for key, dimension in self.space.items()},
            "pruner": self.pruner.model_dump(mode="json"),
            "seed": self.seed,
            "random_trials": self.random_trials,
            "dataset": dataset_id,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def load_sweep(path: Path) -> Sweep:
    """Reads and checks a recipe's file with a `[sweep]` table.

    Raises:
        ConfigurationError: it cannot be read, is not TOML, or as `parse_sweep`.
    """
    return parse_sweep(read_toml(path), origin=str(path))


def parse_sweep(content: Mapping[str, Any], *, origin: str) -> Sweep:
    """Checks plain values (of TOML) and freezes them. `origin` names them in errors.

    Raises:
        ConfigurationError: names each unknown key with the nearest known one and each impossible value; a key that
            the recipe does not have, or that cannot be searched; edges of the space that make no recipe.
    """
    if not isinstance(content.get("sweep"), Mapping):
        raise ConfigurationError(
            f"{origin} has no [sweep] table: it is a recipe, not a search.",
            fix="add one, as recipes/sweeps/baseline.toml has, or train by it: `cifar10 train`.",
        )
    recipe = parse_recipe({key: value for key, value in content.items() if key != "sweep"}, origin=origin)
    try:
        table = _Table.model_validate(content["sweep"])
    except ValidationError as error:
        wrong = "; ".join(_explain(item) for item in error.errors())
        raise ConfigurationError(
            f"{origin} cannot be used: {wrong}.",
            fix="correct these values; ml/training/sweep_space.py says what each means.",
        ) from error
    own = flat(recipe)
    for key in table.space:
        _refuse_unless_searchable(key, own, origin)
    sweep = Sweep(
        recipe=recipe,
        trials=table.trials,
        timeout_minutes=table.timeout_minutes,
        seed=table.seed,
        random_trials=table.random_trials,
        pruner=table.pruner,
        space={key: dimension.like(own[key]) for key, dimension in table.space.items()},
    )
    for values in edges(sweep.space):
        try:
            sweep.recipe_for(values)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{origin} has a space in which not every recipe can work. With {spoken(values)}: {error.message}",
                fix="narrow the space, or change the recipe around it, so that all its values go together.",
            ) from error
    return sweep


def flat(recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values by dotted key, a stage by its name: the keys that `with_overrides` takes."""
    values: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        if key == "stages":
            values |= {f"stages.{stage['name']}.{name}": held for stage in value for name, held in stage.items()}
        elif isinstance(value, Mapping):
            values |= {f"{key}.{name}": held for name, held in value.items()}
        else:
            values[key] = value
    return values


def edges(space: Mapping[str, Range | Choices]) -> Iterator[dict[str, Value]]:
    """The combinations at which a space that cannot work shows it.

    Every corner (each range at an end, each choice), or 2048 of them drawn by a fixed seed where there are more, in
    which each end and each choice still occurs; then along each dimension every value, where it has at most 100.
    """
    names, extremes = list(space), [dimension.extremes() for dimension in space.values()]
    if math.prod(len(ends) for ends in extremes) <= _MOST_CORNERS:
        corners: Iterator[tuple[Value, ...]] = itertools.product(*extremes)
    else:
        corners = _some(extremes)
    yield from (dict(zip(names, corner, strict=True)) for corner in corners)
    first = {name: ends[0] for name, ends in zip(names, extremes, strict=True)}
    for name, dimension in space.items():
        yield from ({**first, name: value} for value in dimension.values())


def _some(extremes: Sequence[tuple[Value, ...]]) -> Iterator[tuple[Value, ...]]:
    for i in range(max(len(ends) for ends in extremes)):
        yield tuple(ends[i % len(ends)] for ends in extremes)
    draw = random.Random(0)  # noqa: S311 - no secret
    yield from (tuple(draw.choice(ends) for ends in extremes) for _ in range(_MOST_CORNERS))


def spoken(values: Mapping[str, object]) -> str:
    """For people: "stages.fit.learning_rate = 0.003, augmentation.flip = true"."""
    return ", ".join(
        f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {json.dumps(value)}"
        for key, value in values.items()
    )


def _refuse_unless_searchable(key: str, own: Mapping[str, Any], origin: str) -> None:
    # A stage's name is what it is called by.
    reason = NOT_SEARCHED.get(key) or ("stages are called by it" if key in own and _is_stage_name(key) else None)
    if reason is not None:
        raise ConfigurationError(
            f"{origin}: {key!r} cannot be searched: {reason}.", fix=f"take {key!r} out of [sweep.space]."
        )
    if key not in own:
        raise ConfigurationError(
            f"{origin}: [sweep.space] names {key!r}, which the recipe does not have{_nearest(key, list(own))}.",
            fix="use a key of the recipe around it, in quotes, a stage by its name: "
            '"stages.fit.learning_rate" = { low = 0.0001, high = 0.01, log = true }.',
        )


def _is_stage_name(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(".name")


_TABLES: dict[str, type[BaseModel]] = {"": _Table, "pruner": Pruner, "range": Range, "choices": Choices}


def _explain(item: Any) -> str:
    # ("space", <dotted key>, "range" or "choices", <name>): the third is the kind, which the discriminator puts there.
    location = [str(part) for part in item["loc"]]
    kind = location.pop(2) if location[0] == "space" and len(location) > 2 else location[0]
    key = ".".join(["sweep", *(f'"{part}"' if "." in part else part for part in location)])
    if item["type"] == "extra_forbidden":
        table = _TABLES.get(kind if len(location) > 1 else "", _Table)
        return f"unknown key {key}{_nearest(location[-1], list(table.model_fields))}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}"
    return f"{key} = {item['input']!r}: {item['msg']}"


def _nearest(word: str, known: Sequence[str]) -> str:
    # "learning_rate" is meant for "stages.fit.learning_rate", which shares too few letters to be near.
    ends_alike = [name for name in known if name.endswith(f".{word.rsplit('.', 1)[-1]}")]
    return nearest(word, known) or (nearest(ends_alike[0], ends_alike) if ends_alike else "")
