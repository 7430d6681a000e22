"""What a search may try: what is refused, at which edges, and what the values are."""

import itertools
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import ConfigurationError
from ml.training.recipe import RECIPES_DIR, available_recipes, load_recipe, parse_recipe
from ml.training.sweep_space import Choices, Range, Sweep, edges, flat, load_sweep, parse_sweep

RECIPE = """
name = "tiny"
architecture = "baseline"
train_limit = 100

[optimizer]
name = "adamw"

[[stages]]
name = "first"
epochs = 3
learning_rate = 0.01

[[stages]]
name = "second"
epochs = 2
learning_rate = 0.001
unfreeze_from = "dense"
"""


def parsed(space: str, table: str = "trials = 4") -> Sweep:
    content = tomllib.loads(f"{RECIPE}\n[sweep]\n{table}\n[sweep.space]\n{space}\n")
    return parse_sweep(content, origin="tiny.toml")


def test_the_shipped_searches_can_be_used_and_begin_with_their_own_recipe() -> None:
    files = sorted((RECIPES_DIR / "sweeps").glob("*.toml"))
    assert files
    for path in files:
        sweep = load_sweep(path)
        own = sweep.recipes_own_values
        assert own is not None
        assert sweep.recipe_for(own) == sweep.recipe


def test_a_search_is_no_recipe_and_a_recipe_no_search() -> None:
    names = [name for architecture in ("baseline", "vgg16") for name in available_recipes(architecture)]
    assert names
    with pytest.raises(ConfigurationError, match=r"no architecture 'sweeps'"):
        load_recipe("sweeps", "baseline")
    with pytest.raises(ConfigurationError, match="unknown key 'sweep'"):
        parse_recipe(tomllib.loads((RECIPES_DIR / "sweeps" / "baseline.toml").read_text()), origin="x")
    with pytest.raises(ConfigurationError, match=r"no \[sweep\] table"):
        load_sweep(RECIPES_DIR / "baseline" / "demo.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_sweep(Path("nowhere.toml"))


def test_the_keys_are_those_that_overrides_take() -> None:
    sweep = parsed('"stages.second.learning_rate" = { low = 1e-5, high = 1e-2, log = true }')
    keys = flat(sweep.recipe)
    assert sweep.recipe.with_overrides(keys) == sweep.recipe
    assert {"stages.first.epochs", "stages.second.learning_rate", "model.filters", "batch_size"} <= set(keys)
    assert sweep.recipe_for({"stages.second.learning_rate": 0.005}).stages[1].learning_rate == 0.005


def test_a_key_may_be_written_with_quotes_or_without() -> None:
    quoted, bare = (
        parsed(f"{key} = {{ low = 1, high = 3 }}") for key in ('"stages.first.epochs"', "stages.first.epochs")
    )
    assert quoted == bare
    assert list(bare.space) == ["stages.first.epochs"]


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ('"model.dens_units" = { low = 1, high = 2 }', "did you mean 'model.dense_units'"),
        ('"learning_rate" = { low = 0.1, high = 0.2 }', "did you mean 'stages.first.learning_rate'"),
        ('"stages.third.epochs" = { low = 1, high = 2 }', "did you mean 'stages."),
        ('"seed" = { low = 1, high = 2 }', "luck"),
        ('"test_limit" = { low = 10, high = 20 }', "never looks at the test split"),
        ('"validation_limit" = { low = 10, high = 20 }', "the same validation images"),
        ('"architecture" = { choices = ["baseline", "vgg16"] }', "cannot be searched"),
        ('"stages.first.name" = { choices = ["a", "b"] }', "called by it"),
        ('"batch_size" = { lo = 1, high = 2 }', "did you mean 'low'"),
        ('"batch_size" = { low = 1 }', "high is missing"),
        ('"batch_size" = { low = 2, high = 2 }', "must be below high"),
        ('"batch_size" = { low = 1, high = 8, step = 2 }', "is not reached"),
        ('"batch_size" = { low = 1, high = 8, step = 0 }', "greater than 0"),
        ('"batch_size" = { low = "1", high = 8 }', "low"),
        ('"batch_size" = { choices = [8] }', "at least 2"),
        ('"batch_size" = { choices = [8, 8] }', "twice"),
        ('"batch_size" = { choices = [8, 16], low = 1 }', "unknown key"),
        ('"batch_size" = 8', "valid dictionary"),
        ('"optimizer.weight_decay" = { low = 0.0, high = 0.1, log = true }', "must be above 0"),
        ('"optimizer.weight_decay" = { low = 0.1, high = 0.2, log = true, step = 0.1 }', "do not go together"),
        ("", "at least 1"),
    ],
)
def test_what_is_written_wrongly_is_refused_by_name(space: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parsed(space)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("trial = 3", "did you mean 'trials'"),
        ("trials = 0", "sweep.trials = 0"),
        ("trials = 4\ntimeout_minutes = 0", "timeout_minutes"),
        ("trials = 4\npruner = { startup = 3 }", "did you mean 'startup_trials'"),
        ("trials = 4\npruner = { warmup_epochs = -1 }", "sweep.pruner.warmup_epochs = -1"),
    ],
)
def test_a_wrong_table_is_refused_by_name(table: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parsed('"batch_size" = { low = 8, high = 16 }', table)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        # One end, one choice, a combination, a value between two good ends, a kind that the key does not take.
        ('"batch_size" = { low = 0, high = 16 }', "batch_size = 0"),
        ('"model.dropout" = { low = 0.5, high = 1.0 }', "model.dropout = 1"),
        ('"model.filters" = { choices = [[8], [8, 8], [8, 8, 8, 8, 8, 8]] }', "model.filters"),
        (
            '"optimizer.name" = { choices = ["adamw", "adam"] }\n"optimizer.weight_decay" = { low = 0.0, high = 0.1 }',
            "adamw",
        ),
        (
            '"stages.first.epochs" = { low = 1, high = 4 }\n"stages.first.warmup_epochs" = { low = 0.0, high = 2.0 }',
            "must be below epochs",
        ),
        ('"batch_size" = { choices = [10, 90, 110] }', "larger than train_limit"),
        ('"batch_size" = { low = 1.0, high = 8.0 }', "valid integer"),
        ('"augmentation.flip" = { low = 0, high = 1 }', "valid boolean"),
    ],
)
def test_a_space_in_which_a_recipe_cannot_work_is_refused_before_anything_runs(space: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="not every recipe can work") as caught:
        parsed(space)
    assert says in str(caught.value)


def test_a_bad_value_between_two_good_ends_is_found_where_there_are_few() -> None:
    content = tomllib.loads(
        'name = "v"\narchitecture = "vgg16"\n[[stages]]\nname = "head"\nepochs = 1\nlearning_rate = 0.001\n'
        'unfreeze_from = "dense"\n[sweep]\ntrials = 2\n[sweep.space]\n"model.input_size" = { low = 32, high = 64 }\n'
    )
    with pytest.raises(ConfigurationError, match="input_size = 33"):
        parse_sweep(content, origin="x")
    content["sweep"]["space"]["model.input_size"]["step"] = 32
    assert parse_sweep(content, origin="x").space["model.input_size"].values() == (32, 64)


def test_whole_numbers_are_fractions_where_the_key_takes_those() -> None:
    space = parsed('"augmentation.mixup" = { low = 0, high = 2 }\n"augmentation.shift" = { low = 0, high = 2 }').space
    assert space["augmentation.mixup"] == Range(low=0.0, high=2.0)
    assert not space["augmentation.mixup"].whole  # type: ignore[union-attr]
    assert space["augmentation.shift"].whole  # type: ignore[union-attr]
    (choices,) = parsed('"label_smoothing" = { choices = [0, 0.1] }').space.values()
    assert choices.holds(0.0)


def test_the_recipe_itself_is_tried_only_where_it_lies_in_the_space() -> None:
    assert parsed('"batch_size" = { low = 32, high = 64 }').recipes_own_values == {"batch_size": 64}
    assert parsed('"batch_size" = { low = 8, high = 16 }').recipes_own_values is None
    assert parsed('"batch_size" = { choices = [8, 16] }').recipes_own_values is None


def test_a_search_is_told_by_all_that_makes_its_trials_comparable() -> None:
    space = '"batch_size" = { low = 8, high = 16 }'
    one = parsed(space)
    assert one.digest("ds-1") == parsed(space, "trials = 9\ntimeout_minutes = 3.0").digest("ds-1")
    assert one.with_trials(9).digest("ds-1") == one.digest("ds-1")
    others = [
        one.digest("ds-2"),
        parsed('"batch_size" = { low = 8, high = 17 }').digest("ds-1"),
        parsed(space, "trials = 4\nseed = 1").digest("ds-1"),
        parsed(space, "trials = 4\npruner = { warmup_epochs = 3 }").digest("ds-1"),
    ]
    assert len({one.digest("ds-1"), *others}) == 5
    assert (one.with_trials(None).trials, one.with_trials(9).trials) == (4, 9)


numbers = st.integers(-50, 50) | st.floats(-50, 50, allow_nan=False)
ranges = st.tuples(numbers, numbers).filter(lambda ends: ends[0] < ends[1]).map(lambda e: Range(low=e[0], high=e[1]))
choices = st.lists(
    st.booleans() | st.integers(0, 9) | st.text(max_size=3), min_size=2, max_size=5, unique_by=json.dumps
).map(lambda values: Choices(choices=tuple(values)))
spaces = st.dictionaries(st.text("abc", min_size=1, max_size=4), ranges | choices, min_size=1, max_size=14)


@given(spaces)
def test_every_end_and_every_choice_is_among_the_edges_and_all_edges_are_in_the_space(
    space: dict[str, Range | Choices],
) -> None:
    found = list(edges(space))
    for key, dimension in space.items():
        seen = {json.dumps(values[key]) for values in found}
        assert {json.dumps(value) for value in dimension.extremes()} <= seen
        assert all(dimension.holds(values[key]) for values in found)
    corners = math.prod(len(dimension.extremes()) for dimension in space.values())
    assert all(list(values) == list(space) for values in found)
    if corners <= 2048:
        every = itertools.product(*(dimension.extremes() for dimension in space.values()))
        assert [tuple(values.values()) for values in found[:corners]] == list(every)
    assert len(found) < 2100 + 101 * len(space)


@given(st.integers(-20, 20), st.integers(1, 30), st.integers(1, 5))
def test_the_values_of_a_stepped_range_are_all_that_it_holds(low: int, steps: int, step: int) -> None:
    stepped = Range(low=low, high=low + steps * step, step=step)
    held = [number for number in range(low - 10, low + steps * step + 10) if stepped.holds(number)]
    assert list(stepped.values()) == held
    assert not stepped.holds(True)


def test_reading_a_search_imports_neither_tensorflow_nor_mlflow() -> None:
    code = "import sys, ml.training.study; print({'tensorflow', 'keras', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_step_is_held_however_its_sum_is_rounded():
    found = Range(low=0.7, high=0.7 + 0.1, step=0.1)
    assert found.holds(0.8)
    assert found.holds(0.7)
    assert not found.holds(0.9)
    assert not found.holds(0.6)
    assert not found.holds(0.75)
