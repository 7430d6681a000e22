"""Recipes: the shipped ones, and what is refused and how."""

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import ConfigurationError
from ml.models.specs import ARCHITECTURES, BaselineSpec, Vgg16Spec
from ml.training.recipe import (
    RECIPES_DIR,
    BaselineRecipe,
    Optimizer,
    Stage,
    Vgg16Recipe,
    available_recipes,
    load_recipe,
    parse_recipe,
    refuse_unless_it_fits,
)

FIT = {"name": "fit", "epochs": 4, "learning_rate": 0.1}
SMALL: dict[str, Any] = {"name": "x", "architecture": "baseline", "stages": [FIT]}
RECIPE = BaselineRecipe(name="x", stages=(Stage(name="fit", epochs=4, learning_rate=0.1),))
SHIPPED = [(architecture, name) for architecture in ARCHITECTURES for name in available_recipes(architecture)]


@pytest.mark.parametrize(("architecture", "name"), SHIPPED)
def test_every_shipped_recipe_loads_and_survives_json(architecture: str, name: str) -> None:
    recipe = load_recipe(architecture, name)
    assert (recipe.architecture, recipe.name) == (architecture, name)
    assert parse_recipe(recipe.model_dump(mode="json"), origin="json") == recipe
    assert recipe.with_overrides({}) == recipe


def test_each_architecture_has_the_reports_recipe_and_a_demo() -> None:
    assert {(a, name) for a in ("baseline", "vgg16") for name in ("report", "demo")} <= set(SHIPPED)


def test_the_reports_values() -> None:
    baseline, vgg16 = load_recipe("baseline", "report"), load_recipe("vgg16", "report")
    assert (baseline.batch_size, baseline.epochs_in_all) == (64, 10)
    assert baseline.model.filters[0] == 32  # type: ignore[union-attr]
    assert vgg16.epochs_in_all == 20
    assert [stage.unfreeze_from for stage in vgg16.stages] == ["dense", "block5_conv1"]
    assert vgg16.stages[1].learning_rate < vgg16.stages[0].learning_rate
    for recipe in (baseline, vgg16):
        assert recipe.train_limit is recipe.validation_limit is recipe.test_limit is None


def test_demo_candidates_are_judged_on_the_same_images() -> None:
    demos = [load_recipe(architecture, "demo") for architecture in ("baseline", "vgg16")]
    assert len({(recipe.validation_limit, recipe.test_limit) for recipe in demos}) == 1


def test_overrides_replace_and_blanks_do_not() -> None:
    recipe = load_recipe("vgg16", "demo")
    changed = recipe.with_overrides({"stages.head.epochs": 2, "train_limit": 70, "model.dropout": 0.3, "seed": None})
    assert [stage.epochs for stage in changed.stages] == [2, recipe.stages[1].epochs]
    assert (changed.train_limit, changed.model.dropout, changed.seed) == (70, 0.3, recipe.seed)
    back = {"stages.head.epochs": recipe.stages[0].epochs, "train_limit": recipe.train_limit, "model.dropout": 0.1}
    assert changed.with_overrides(back) == recipe


def with_stage(**changes: object) -> dict[str, object]:
    return {"stages": [FIT | changes]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batchsize": 3}, "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ({"learning_rte": 0.1}, "(did you mean 'learning_rate'?)"),
        ({"model": {"dens_units": 5}}, "unknown key 'model.dens_units' (did you mean 'dense_units'?)"),
        ({"model": {"input_size": 64}}, "unknown key 'model.input_size'"),
        ({"optimizer": {"momentun": 0.5}}, "unknown key 'optimizer.momentun' (did you mean 'momentum'?)"),
        ({"augmentation": {"flop": True}}, "unknown key 'augmentation.flop' (did you mean 'flip'?)"),
        (with_stage(epoch=1), "unknown key 'stages.0.epoch' (did you mean 'epochs'?)"),
        (with_stage(unfreeze_form="dense"), "(did you mean 'unfreeze_from'?)"),
        (with_stage(epochs=0), "stages.0.epochs = 0"),
        (with_stage(epochs="5"), "stages.0.epochs = '5'"),
        (with_stage(epochs=2.5), "stages.0.epochs = 2.5"),
        (with_stage(learning_rate=0), "learning_rate = 0"),
        (with_stage(learning_rate=float("nan")), "learning_rate = nan"),
        (with_stage(learning_rate=float("inf")), "learning_rate = inf"),
        (with_stage(schedule="warm"), "schedule = 'warm'"),
        (with_stage(layer_decay=0), "layer_decay"),
        (with_stage(layer_decay=1.5), "layer_decay"),
        (with_stage(warmup_epochs=4), "warmup_epochs (4.0) must be below epochs (4)"),
        (with_stage(warmup_epochs=7), "warmup_epochs (7.0) must be below epochs (4)"),
        (with_stage(name="Head!"), "stages.0.name"),
        (with_stage(unfreeze_from="dence"), "'dence': there is no such layer with weights (did you mean 'dense'?)"),
        (with_stage(unfreeze_from="block9_conv1"), "there are block1_conv1, block1_norm1"),
        (with_stage(unfreeze_from="flatten"), "no such layer with weights"),
        ({"stages": []}, "stages"),
        ({"stages": [FIT, FIT]}, "every stage needs a name of its own"),
        ({"stages": [{"name": "fit", "learning_rate": 0.1}]}, "stages.0.epochs is missing"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 64, "train_limit": 63}, "batch_size (64) is larger than train_limit (63)"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed"),
        ({"train_limit": 3}, "train_limit = 3"),
        ({"precision": "float16"}, "precision = 'float16'"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
        ({"weight_averaging": 1}, "weight_averaging"),
        ({"early_stopping": 0}, "early_stopping = 0"),
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, 'with it, name = "adamw"'),
        ({"optimizer": {"name": "adm"}}, "optimizer.name = 'adm'"),
        ({"augmentation": {"shift": 20}}, "augmentation.shift = 20"),
        ({"augmentation": {"flip": True, "mixup": 0.2, "views": 2}}, "mixup and cutmix need views = 0"),
        ({"augmentation": {"cutmix": 1.0, "views": 2}}, "mixup and cutmix need views = 0"),
        ({"augmentation": {"views": 2}}, "views need an augmentation"),
        ({"model": {"dropout": 1.0}}, "model.dropout = 1.0"),
        ({"model": {"filters": []}}, "model.filters"),
        ({"model": {"filters": [32, "x"]}}, "model.filters"),
        ({"model": {"filters": [8] * 6}}, "model.filters"),
        ({"architecture": "vgg16", "model": {"input_size": 48}}, "model.input_size = 48"),
        ({"architecture": "vgg16", "model": {"filters": [8]}}, "unknown key 'model.filters'"),
        ({"architecture": "vgg16", **with_stage(unfreeze_from="block5_conv4")}, "(did you mean 'block5_conv"),
        ({"architecture": "resnet"}, "architecture must be one of baseline, vgg16"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe(SMALL | changes, origin="mine.toml")
    assert says in caught.value.message
    assert caught.value.message.startswith("mine.toml cannot be used")


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe(SMALL | {"seed": -1, "stages": [FIT | {"epochs": 0}], "flip": True}, origin="mine.toml")
    for said in ("seed = -1", "stages.0.epochs = 0", "unknown key 'flip'"):
        assert said in caught.value.message
    assert "at least 1 item" not in caught.value.message, "the faulty stage is not missing as well"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"sead": 3}, "unknown key 'sead' (did you mean 'seed'?)"),
        ({"augmentation.cutot": 3}, "unknown key 'augmentation.cutot' (did you mean 'cutout'?)"),
        ({"augmentatoin.cutout": 3}, "(did you mean 'augmentation'?)"),
        ({"stages.fti.epochs": 3}, "there is no stage 'fti' (did you mean 'fit'?)"),
        ({"stages.fit.epoch": 3}, "unknown key 'stages.fit.epoch' (did you mean 'epochs'?)"),
        ({"stages.fit": {}}, "unknown key 'stages.fit'"),
        ({"seed.x": 3}, "unknown key 'seed.x'"),
        ({"model.filters.0": 3}, "unknown key 'model.filters.0'"),
        ({"model.filters.0.x": 3}, "unknown key 'model.filters.0.x'"),
        ({"": 3}, "unknown key ''"),
        ({"stages.fit.epochs": 0}, "stages.0.epochs = 0"),
        ({"model": {"dens_units": 5}}, "'dense_units'"),
        ({"architecture": "vgg16", "model": {}}, "cannot change a recipe's architecture"),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_name(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RECIPE.with_overrides(overrides)
    assert says in caught.value.message


KEYS = st.lists(
    st.sampled_from(["stages", "fit", "epochs", "model", "filters", "optimizer", "name", "seed", "0", "", "x"]),
    min_size=1,
    max_size=4,
).map(".".join)
VALUES = (
    st.none() | st.integers(-2, 5) | st.floats() | st.text(max_size=3) | st.just([]) | st.just([{}, 5]) | st.just({})
)


@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_whatever_is_overridden_gives_a_checked_recipe_or_a_refusal(overrides: dict[str, object]) -> None:
    with suppress(ConfigurationError):  # and nothing else
        changed = RECIPE.with_overrides(overrides)
        assert parse_recipe(changed.model_dump(mode="json"), origin="again") == changed


POSSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "batch_size": st.integers(1, 4096),
        "precision": st.sampled_from(["float32", "mixed_bfloat16", "mixed_float16"]),
        "label_smoothing": st.floats(0, 0.9),
        "weight_averaging": st.floats(0, 0.999),
        "keep_best_epoch": st.booleans(),
        "early_stopping": st.integers(1, 9),
        "optimizer": st.just({"name": "sgd", "momentum": 0.5, "weight_decay": 0.01}),
        "optimizer.name": st.sampled_from(["sgd", "adamw"]),
        "augmentation.shift": st.integers(0, 16),
        "augmentation.mixup": st.floats(0, 10),
        "stages.fit.epochs": st.integers(1, 100),
        "stages.fit.learning_rate": st.floats(1e-6, 10),
        "stages.fit.unfreeze_from": st.sampled_from(RECIPE.model.learning_layers),
        "model.filters": st.lists(st.integers(1, 512), min_size=3, max_size=5),
        "model.dense_units": st.integers(1, 999),
    },
)


@given(POSSIBLE)
def test_overrides_and_back_again_is_the_recipe_itself(overrides: dict[str, object]) -> None:
    changed = RECIPE.with_overrides(overrides)
    assert parse_recipe(changed.model_dump(mode="json"), origin="json") == changed
    plain = RECIPE.model_dump(mode="json")
    back = {key.split(".")[0]: plain[key.split(".")[0]] for key in overrides if key != "early_stopping"}
    if "early_stopping" not in overrides:  # None is no override, so absence cannot be asked for
        assert changed.with_overrides(back) == RECIPE
    other_values = {key for key in overrides if key != "seed"} and changed.with_overrides({"seed": 0}) != RECIPE
    assert (changed.digest != RECIPE.digest) == bool(other_values)


def test_overriding_leaves_what_was_given_alone() -> None:
    filters = [8, 16]
    changed = RECIPE.with_overrides({"model.filters": filters, "model.dense_units": 5})
    filters.append(3)
    assert changed.model.filters == (8, 16)
    assert RECIPE.model == BaselineSpec()


@pytest.mark.parametrize(
    "overrides",
    [
        {"name": "y"},
        {"batch_size": 8},
        {"train_limit": 100},
        {"corrupted_limit": 100},
        {"stages.fit.epochs": 5},
        {"stages.fit.layer_decay": 0.5},
        {"optimizer.name": "sgd"},
        {"optimizer.momentum": 0.5},
        {"augmentation.flip": True},
        {"model.dropout": 0.1},
        {"keep_best_epoch": False},
        {"precision": "mixed_bfloat16"},
    ],
)
def test_the_digest_follows_every_value_but_the_seed(overrides: dict[str, object]) -> None:
    assert RECIPE.with_overrides(overrides).digest != RECIPE.digest
    assert RECIPE.with_overrides(overrides).with_overrides({"seed": 9}).digest != RECIPE.digest


def test_the_digest_is_of_what_the_values_mean() -> None:
    assert len(RECIPE.digest) == 12
    assert RECIPE.with_overrides({"seed": 77}).digest == RECIPE.digest
    spelt_out = parse_recipe(SMALL | {"optimizer": {"name": "adam"}, "batch_size": 64}, origin="spelt out")
    assert spelt_out.digest == RECIPE.digest


def test_the_layers_that_may_be_unfrozen_are_the_models(tmp_path: Path) -> None:
    recipe = RECIPE.with_overrides({"model.filters": [4, 4], "model.convolutions_per_block": 1})
    assert recipe.model.learning_layers == (
        *("block1_conv1", "block1_norm1", "block2_conv1", "block2_norm1"),
        *("dense", "probabilities"),
    )
    narrow = recipe.with_overrides({"stages.fit.unfreeze_from": "block2_conv1"})
    with pytest.raises(ConfigurationError, match="no such layer"):
        narrow.with_overrides({"model.filters": [4]})
    assert len(Vgg16Spec().learning_layers) == 15


def test_more_than_a_batch_of_images_is_needed() -> None:
    refuse_unless_it_fits(RECIPE, 64)
    with pytest.raises(ConfigurationError, match=r"batches of 64, and there are 63 training images"):
        refuse_unless_it_fits(RECIPE, 63)


def test_recipes_are_frozen() -> None:
    recipe = load_recipe("baseline", "demo")
    for part, name in ((recipe, "seed"), (recipe.stages[0], "epochs"), (recipe.optimizer, "momentum")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, name, 5)
    assert Optimizer(name="sgd", weight_decay=0.1).weight_decay == 0.1


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
    (tmp_path / "baseline" / "torn.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigurationError, match="not TOML"):
        load_recipe("baseline", "torn", tmp_path)
    shutil.copy(RECIPES_DIR / "vgg16" / "demo.toml", tmp_path / "baseline" / "demo.toml")
    with pytest.raises(ConfigurationError, match="calls itself 'demo' of architecture 'vgg16'"):
        load_recipe("baseline", "demo", tmp_path)


def test_reading_a_recipe_imports_no_tensorflow() -> None:
    code = (
        "import sys, ml.training.recipe as r; r.load_recipe('vgg16', 'demo'); "
        "sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_two_kinds_are_told_apart_by_their_architecture() -> None:
    assert isinstance(parse_recipe(SMALL, origin="x"), BaselineRecipe)
    assert isinstance(parse_recipe(SMALL | {"architecture": "vgg16"}, origin="x"), Vgg16Recipe)
