"""Cached outputs of frozen layers: made once, found again, bounded, and never taken from a file that is not whole."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.errors import ConfigurationError, StorageError
from ml.models.catalog import build
from ml.models.chain import chain_of
from ml.training import fit
from ml.training.augmentation import AugmentedImages, draw
from ml.training.feature_cache import FeatureCache, digest_of_array, digest_of_layers
from ml.training.fit import train
from ml.training.recipe import BaselineRecipe, Stage
from tests.model.conftest import BASELINE, first

SHAPE = (4, 8)
SIZE = 4 * 4 * 8 + 128
"""Bytes of such an array's file: float32, and NumPy's header."""


def filled(value: float) -> Callable[[np.ndarray], None]:
    def fill(array: np.ndarray) -> None:
        array[:] = value

    return fill


def never(_: np.ndarray) -> None:
    raise AssertionError("it was made again")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "new", 10_000)
    made = cache.array("ab", SHAPE, filled(3))
    assert isinstance(made, np.memmap)
    assert (made.dtype, made.shape) == (np.float32, SHAPE)
    assert np.all(made == 3)
    with pytest.raises(ValueError, match="read-only"):
        made[0] = 1
    assert np.all(FeatureCache(tmp_path / "new", 10_000).array("ab", SHAPE, never) == 3)
    assert files(tmp_path / "new") == {"ab.npy"}


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 3 * SIZE)
    kept = {}
    for second, key in enumerate(("aa", "bb", "cc")):
        kept[key] = cache.array(key, SHAPE, filled(second))
        os.utime(tmp_path / f"{key}.npy", (1000 + second, 1000 + second))
    cache.array("aa", SHAPE, never)  # used: now bb is the oldest
    cache.array("dd", SHAPE, filled(9))
    assert files(tmp_path) == {"aa.npy", "cc.npy", "dd.npy"}
    assert np.all(kept["bb"] == 1), "who maps a deleted file keeps it"


def test_more_than_the_budget_is_refused_with_both_sizes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 2**30)
    with pytest.raises(ConfigurationError, match=r"needs 3\.0 GiB .* allows 1\.0") as caught:
        cache.array("aa", (3, 2**28), never)
    assert "FEATURE_CACHE_GIB" in caught.value.fix
    assert files(tmp_path) == set()


def test_a_fill_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        FeatureCache(tmp_path, 10_000).array("aa", SHAPE, never)
    assert files(tmp_path) == set()


def test_a_process_killed_while_it_fills_leaves_a_draft_that_nobody_uses(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 10_000)

    def die_half_way(array: np.ndarray) -> None:
        array[:2] = 7
        array.flush()  # type: ignore[attr-defined]  # a memmap
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:  # NumPy and files alone: TensorFlow's threads are not here
        cache.array("aa", SHAPE, die_half_way)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert files(tmp_path) == {f"aa.{child}.draft"}
    alive = tmp_path / f"cc.{os.getppid()}.draft"  # of somebody who is at work
    alive.write_bytes(b"x")
    assert np.all(cache.array("aa", SHAPE, filled(1)) == 1)
    assert files(tmp_path) == {"aa.npy", alive.name}


@pytest.mark.parametrize(
    "torn", [lambda whole: whole[: SIZE - 5], lambda whole: whole[:40], lambda _: b"", lambda _: b"no"]
)
def test_a_file_that_is_not_whole_is_made_anew_and_that_is_said(
    tmp_path: Path, torn: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path, 10_000)
    cache.array("aa", SHAPE, filled(1))
    path = tmp_path / "aa.npy"
    path.write_bytes(torn(path.read_bytes()))
    assert np.all(cache.array("aa", SHAPE, filled(2)) == 2)
    assert "made anew" in caplog.text
    assert np.all(cache.array("aa", SHAPE, never) == 2)


def test_a_file_of_another_shape_or_type_is_made_anew(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 10_000)
    for other in (np.zeros((3, 8), np.float32), np.zeros(SHAPE, np.float64)):
        np.save(tmp_path / "aa.npy", other)
        assert np.all(cache.array("aa", SHAPE, filled(2)) == 2)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Features could not be kept"):
        FeatureCache(tmp_path / "file", 10_000).array("aa", SHAPE, filled(1))


def test_digests_follow_weights_settings_and_pixels(train_split: Split) -> None:
    keras.utils.set_random_seed(0)
    steps = chain_of(build(BASELINE.model))[:3]
    before = digest_of_layers(steps)
    steps[1].trainable = False
    assert digest_of_layers(steps) == before
    kernel, bias = steps[1].get_weights()
    kernel[0, 0, 0, 0] += 1e-6
    steps[1].set_weights([kernel, bias])
    assert digest_of_layers(steps) != before
    assert digest_of_layers([keras.layers.MaxPooling2D(2)]) != digest_of_layers([keras.layers.MaxPooling2D(3)])
    assert digest_of_array(train_split.images) != digest_of_array(train_split.images[1:])


HEAD = BaselineRecipe(
    name="head",
    batch_size=16,
    model=BASELINE.model.model_copy(update={"filters": (4,)}),
    stages=(Stage(name="head", epochs=1, learning_rate=0.01, unfreeze_from="dense"),),
)


@pytest.fixture
def run(tmp_path: Path, train_split: Split, validation_split: Split) -> Callable[..., fit._Run]:
    """The stages' common ground: features are made by its `prepare`, without a training."""

    def make(recipe: BaselineRecipe, images: int = 40, weights: int = 0) -> fit._Run:
        keras.utils.set_random_seed(weights)
        cache = FeatureCache(tmp_path, 2**30)
        return fit._Run(build(recipe.model), recipe, first(train_split, images), first(validation_split, 20), cache)

    return make


def test_features_are_found_by_the_next_training_and_by_none_that_would_have_others(
    run: Callable[..., fit._Run], tmp_path: Path
) -> None:
    def new_files(recipe: BaselineRecipe, **what: int) -> int:
        before = files(tmp_path)
        run(recipe, **what).prepare(recipe.stages[0])
        return len(files(tmp_path) - before)

    assert new_files(HEAD) == 2  # the training's and the validation's
    assert new_files(HEAD) == 0
    # What does not touch the features does not touch their names.
    same = {"seed": 9, "model.dense_units": 5, "batch_size": 8, "stages.head.learning_rate": 0.5, "name": "other"}
    assert new_files(HEAD.with_overrides(same)) == 0
    assert new_files(HEAD, images=39) == 1
    assert new_files(HEAD, weights=1) == 2
    assert new_files(HEAD.with_overrides({"precision": "mixed_bfloat16"})) == 2
    views = HEAD.with_overrides({"augmentation": {"flip": True, "views": 3}})
    assert new_files(views) == 3  # the validation's images are as they were
    assert new_files(views) == 0
    assert new_files(views.with_overrides({"augmentation.views": 4})) == 1
    assert new_files(views.with_overrides({"seed": 9})) == 3
    assert new_files(views.with_overrides({"augmentation.shift": 2})) == 3


def test_the_features_of_a_view_are_the_prefix_of_its_augmented_images(
    run: Callable[..., fit._Run], train_split: Split
) -> None:
    recipe = HEAD.with_overrides({"augmentation": {"flip": True, "shift": 3, "cutout": 6, "views": 2}, "seed": 5})
    ready = run(recipe, images=300)  # more than one extraction's batch
    what = ready.prepare(recipe.stages[0])
    assert what.cached_from == "block1_pool"
    front = keras.Model(what.model.inputs, what.model.get_layer("block1_pool").output)
    images = AugmentedImages(train_split.images[:300], cutout=6)
    for view in (0, 1):
        draws = [
            draw(recipe.augmentation, index, 32, np.random.default_rng([5, view, index[0]]))
            for index in (np.arange(256), np.arange(256, 300))
        ]
        augmented = np.concatenate([images(part) for part in draws])
        expected = front.predict(augmented, verbose=0)
        for epoch in (view, view + 2):
            assert np.allclose(what.train._make(np.arange(300), epoch, 0)["features"], expected, atol=1e-4)
    as_they_are = front.predict(ready._validation.images.astype(np.float32), verbose=0)
    assert np.allclose(what.validation._make(np.arange(20), 0, 0)["features"], as_they_are, atol=1e-4)


def test_a_stage_that_needs_more_than_the_budget_is_refused_before_it_extracts(
    tmp_path: Path, train_split: Split, validation_split: Split
) -> None:
    recipe = HEAD.with_overrides({"augmentation": {"flip": True, "views": 4}})
    # block1_pool gives 16 x 16 x 4 values: 4 views of 40 images and 20 of validation are 737,280 bytes.
    data = first(train_split, 40), first(validation_split, 20)
    with pytest.raises(ConfigurationError, match=r"This stage needs 0\.0 GiB"):
        train(recipe, *data, features=FeatureCache(tmp_path, 737_279))
    assert files(tmp_path) == set()
    train(recipe, *data, features=FeatureCache(tmp_path, 737_280))
