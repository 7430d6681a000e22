"""Pretraining of VGG16's base: that folding changes nothing, and that the file is taken for what it is."""

from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.errors import ConfigurationError, StorageError
from ml.models.catalog import build
from ml.models.chain import chain_of
from ml.models.specs import VGG16_CONVOLUTIONS, Vgg16BaseSpec, Vgg16Spec, norm_of
from ml.models.vgg16_base import folded, save_base
from ml.models.vgg16_weights import Weights, resolve_weights
from ml.toml_files import read_toml
from ml.training.recipe import PRETRAINING_RECIPE, Vgg16BaseRecipe, parse_recipe

ORIGIN = "pretrained on the training split of nothing"


@pytest.fixture(scope="module")
def base() -> keras.Model:
    """A base whose normalisations have seen something: factors and terms that differ by filter."""
    keras.utils.set_random_seed(5)
    model = build(Vgg16BaseSpec())
    rng = np.random.default_rng(5)
    for name in VGG16_CONVOLUTIONS:
        norm = model.get_layer(norm_of(name))
        gamma, beta, mean, variance = norm.get_weights()
        norm.set_weights(
            [
                rng.uniform(0.5, 1.5, gamma.shape),
                rng.normal(0, 0.2, beta.shape),
                rng.normal(0, 0.2, mean.shape),
                rng.uniform(0.5, 2, variance.shape),
            ]
        )
    return model


@pytest.fixture(scope="module")
def weights_file(base: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "deeper" / "base.weights.h5"
    save_base(base, path, ORIGIN)
    return path


def test_folded_normalisations_give_the_same_features(base: keras.Model, validation_split: Split) -> None:
    images = validation_split.images[:8].astype(np.float32)
    expected = _features(base, images)
    found = folded(base).predict(chain_of(base)[0](images), verbose=0)
    assert expected.std() > 0
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_file_is_a_base_for_fine_tuning_and_says_what_it_is(
    base: keras.Model, weights_file: Path, tmp_path: Path, validation_split: Split
) -> None:
    found = resolve_weights(str(weights_file), allow_stand_in=False, cache_dir=tmp_path)
    assert found.kind == "file"
    assert found.label == f"{ORIGIN} sha256:{(found.sha256 or '')[:12]}"
    model = build(Vgg16Spec(dense_units=4), found)
    images = validation_split.images[:4].astype(np.float32)
    ours, theirs = _features(model, images), _features(base, images)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert [path.name for path in weights_file.parent.iterdir()] == ["base.weights.h5"], "no draft is left"


def _features(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """What block 5 gives for these images."""
    for layer in chain_of(model):
        x = layer(x)
        if layer.name == "block5_pool":
            break
    return np.asarray(x)


def test_a_file_of_elsewhere_is_a_file(tmp_path: Path, weights_file: Path) -> None:
    bare = tmp_path / "bare.weights.h5"
    bare.write_bytes(weights_file.read_bytes())
    with h5py.File(bare, "r+") as file:
        del file.attrs["cifar10_origin"]
    assert resolve_weights(str(bare), allow_stand_in=False, cache_dir=tmp_path).label.startswith("file sha256:")


def test_it_starts_from_nothing() -> None:
    with pytest.raises(ConfigurationError, match="starts from nothing"):
        build(Vgg16BaseSpec(), Weights("random"))


def test_a_place_that_cannot_be_written_is_said(base: keras.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        save_base(base, tmp_path / "file" / "x.weights.h5", ORIGIN)


@pytest.mark.parametrize("path", sorted(PRETRAINING_RECIPE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_of_a_base(path: Path) -> None:
    recipe = parse_recipe(read_toml(path), origin="shipped")
    assert isinstance(recipe, Vgg16BaseRecipe)
    assert recipe.name == path.stem
