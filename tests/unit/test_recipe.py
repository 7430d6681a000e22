"""Recipes: the shipped ones, and what is refused and how."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ml.errors import ConfigurationError
from ml.training.recipe import (
    RECIPES_DIR,
    BaselineRecipe,
    Vgg16Recipe,
    available_recipes,
    load_recipe,
    parse_recipe,
)


@pytest.mark.parametrize("architecture", ["baseline", "vgg16"])
def test_every_shipped_recipe_loads_and_survives_json(architecture: str) -> None:
    assert {"report", "demo"} <= set(available_recipes(architecture))
    for name in available_recipes(architecture):
        recipe = load_recipe(architecture, name)
        assert (recipe.architecture, recipe.name) == (architecture, name)
        assert parse_recipe(recipe.model_dump(mode="json"), origin="json") == recipe


def test_the_reports_values() -> None:
    baseline, vgg16 = load_recipe("baseline", "report"), load_recipe("vgg16", "report")
    assert (baseline.batch_size, baseline.epochs, baseline.model.filters[0]) == (64, 10, 32)
    assert isinstance(vgg16, Vgg16Recipe)
    assert vgg16.fine_tuning_learning_rate < vgg16.learning_rate
    for recipe in (baseline, vgg16):
        assert recipe.train_limit is recipe.validation_limit is recipe.test_limit is None


def test_demo_candidates_are_judged_on_the_same_images() -> None:
    demos = [load_recipe(architecture, "demo") for architecture in ("baseline", "vgg16")]
    assert len({(recipe.validation_limit, recipe.test_limit) for recipe in demos}) == 1


def test_overrides_replace_and_blanks_do_not() -> None:
    recipe = load_recipe("vgg16", "demo")
    changed = recipe.with_overrides(epochs=2, train_limit=50, seed=None)
    assert (changed.epochs, changed.train_limit, changed.seed) == (2, 50, recipe.seed)
    assert changed.with_overrides(epochs=recipe.epochs, train_limit=recipe.train_limit) == recipe


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"epoch": 3}, "'epochs'"),
        ({"learning_rte": 0.1}, "'learning_rate'"),
        ({"model": {"dens_units": 5}}, "'dense_units'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": "5"}, "epochs = '5'"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"train_limit": 3}, "train_limit"),
        ({"schedule": "warm"}, "schedule"),
        ({"shift": 20}, "shift"),
        ({"model": {"dropout": 1.0}}, "model.dropout"),
        ({"model": {"filters": []}}, "model.filters"),
        ({"model": {"filters": [32, "x"]}}, "model.filters"),
        ({"model": {"filters": [8] * 6}}, "model.filters"),
        ({"architecture": "vgg16", "fine_tuning_epochs": 1}, "fine_tuning_learning_rate is missing"),
        ({"architecture": "resnet"}, "baseline, vgg16"),
    ],
)
def test_impossible_values_are_refused_by_name(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BaselineRecipe(name="x", epochs=1, learning_rate=0.1).with_overrides(**overrides)
    assert says in caught.value.message


def test_fine_tuning_must_be_gentler() -> None:
    with pytest.raises(ConfigurationError, match="must be below learning_rate"):
        load_recipe("vgg16", "demo").with_overrides(fine_tuning_learning_rate=0.5)


def test_an_override_cannot_change_the_architecture() -> None:
    with pytest.raises(ConfigurationError, match="architecture"):
        BaselineRecipe(name="x", epochs=1, learning_rate=0.1).with_overrides(
            architecture="vgg16", fine_tuning_epochs=1, fine_tuning_learning_rate=0.01, model={}
        )


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("baseline", "demo").epochs = 5  # type: ignore[misc]


def test_unknown_names_point_to_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'demo'"):
        load_recipe("baseline", "dem")
    with pytest.raises(ConfigurationError, match="did you mean 'vgg16'"):
        load_recipe("vgg", "demo")
    with pytest.raises(ConfigurationError, match="There is no recipe"):
        load_recipe("baseline", "../vgg16/demo")


def test_a_broken_or_misplaced_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "torn.toml").write_text('name = "torn')
    with pytest.raises(ConfigurationError, match="not TOML"):
        load_recipe("baseline", "torn", tmp_path)
    shutil.copy(RECIPES_DIR / "vgg16" / "demo.toml", tmp_path / "baseline" / "demo.toml")
    with pytest.raises(ConfigurationError, match="calls itself 'demo' of architecture 'vgg16'"):
        load_recipe("baseline", "demo", tmp_path)


def test_reading_a_recipe_imports_no_tensorflow() -> None:
    code = "import sys, ml.training.recipe as r; r.load_recipe('vgg16', 'demo'); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
