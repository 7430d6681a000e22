"""Augmentation against NumPy, image by image: what is drawn, what is done with it, and what the labels become."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.training.augmentation import AugmentedImages, Draws, draw, neutral, soft_labels
from ml.training.recipe import Augmentation

SIDE, HELD = 12, 9
IMAGES = np.random.default_rng(0).integers(0, 256, (HELD, SIDE, SIDE, 3), dtype=np.uint8)
AUGMENTATIONS = st.builds(
    Augmentation,
    flip=st.booleans(),
    shift=st.integers(0, SIDE - 1),
    cutout=st.integers(0, SIDE + 3),
    mixup=st.sampled_from([0.0, 0.2, 1.0, 8.0]),
    cutmix=st.sampled_from([0.0, 0.2, 1.0, 8.0]),
)


def reference(augmentation: Augmentation, draws: Draws) -> np.ndarray:
    """The batch, image by image and with NumPy's own padding."""
    changed = []
    for i, which in enumerate(draws["index"]):
        image = IMAGES[which].astype(np.float32)
        if "shift" in draws:
            (down, right), reach = draws["shift"][i], SIDE - 1
            padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
            image = padded[reach + down : reach + down + SIDE, reach + right : reach + right + SIDE]
        if "flip" in draws and draws["flip"][i]:
            image = image[:, ::-1]
        if "hole" in draws:
            image = image.copy()
            top, left = draws["hole"][i] - augmentation.cutout // 2
            image[
                max(top, 0) : max(top + augmentation.cutout, 0), max(left, 0) : max(left + augmentation.cutout, 0)
            ] = 127.5
        changed.append(image)
    if "partner" not in draws:
        return np.stack(changed)
    mixed = []
    for i, image in enumerate(changed):
        other, (top, left, bottom, right) = changed[draws["partner"][i]], draws["box"][i]
        pasted = image.copy()
        pasted[top:bottom, left:right] = other[top:bottom, left:right]
        blended = draws["share"][i] * image + (1 - draws["share"][i]) * other
        mixed.append(pasted if draws["box"][i].any() else blended)
    return np.stack(mixed)


def augmented(augmentation: Augmentation, draws: Draws) -> np.ndarray:
    return keras.ops.convert_to_numpy(AugmentedImages(IMAGES, augmentation.cutout)(draws))


@settings(max_examples=60)
@given(AUGMENTATIONS, st.integers(0, 2**32 - 1), st.lists(st.integers(0, HELD - 1), min_size=1, max_size=6))
def test_every_batch_is_what_numpy_makes_of_its_draws(augmentation: Augmentation, seed: int, index: list[int]) -> None:
    draws = draw(augmentation, np.array(index), SIDE, np.random.default_rng(seed))
    batch = augmented(augmentation, draws)
    assert batch.dtype == np.float32
    assert np.allclose(batch, reference(augmentation, draws), atol=1e-3)
    again = draw(augmentation, np.array(index), SIDE, np.random.default_rng(seed))
    assert draws.keys() == again.keys()
    assert all(np.array_equal(draws[key], again[key]) for key in draws)


@settings(max_examples=30)
@given(AUGMENTATIONS, st.lists(st.integers(0, HELD - 1), min_size=1, max_size=6))
def test_neutral_draws_leave_images_and_labels_as_they_are(augmentation: Augmentation, index: list[int]) -> None:
    example = draw(augmentation, np.arange(2), SIDE, np.random.default_rng(3))
    draws = neutral(example, np.array(index))
    assert {key: (value.dtype, value.shape[1:]) for key, value in draws.items()} == {
        key: (value.dtype, value.shape[1:]) for key, value in example.items()
    }
    assert np.array_equal(augmented(augmentation, draws), IMAGES[index].astype(np.float32))
    labels = np.arange(len(index)) % 10
    assert np.array_equal(soft_labels(labels, draws), np.eye(10, dtype=np.float32)[labels])


@settings(max_examples=200)
@given(AUGMENTATIONS.filter(lambda a: a.mixes), st.integers(0, 2**32 - 1))
def test_labels_follow_the_pixels(augmentation: Augmentation, seed: int) -> None:
    """One image white and one black: the mean of what comes out is the share that the label says."""
    plain = Augmentation(mixup=augmentation.mixup, cutmix=augmentation.cutmix)
    draws = draw(plain, np.arange(4), 32, np.random.default_rng(seed))
    labels = np.array([0, 1, 2, 3])
    soft = soft_labels(labels, draws)
    assert soft.dtype == np.float32
    assert soft.min() >= 0
    assert np.allclose(soft.sum(axis=1), 1, atol=1e-6)
    assert sorted(draws["partner"]) == [0, 1, 2, 3]
    for i, partner in enumerate(draws["partner"]):
        top, left, bottom, right = draws["box"][i]
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 32
        if draws["box"][i].any():
            share = 1 - (bottom - top) * (right - left) / 32**2
            assert draws["share"][i] == pytest.approx(share, abs=1e-6)
        expected = np.zeros(10)
        expected[labels[i]] += draws["share"][i]
        expected[labels[partner]] += 1 - draws["share"][i]
        assert np.allclose(soft[i], expected, atol=1e-6)


def test_draws_reach_everything_that_they_may() -> None:
    rng = np.random.default_rng(0)
    draws = draw(Augmentation(flip=True, shift=3, cutout=4), np.arange(4000), 32, rng)
    assert {key: value.dtype for key, value in draws.items()} == dict.fromkeys(draws, np.dtype(np.int32))
    assert 1800 < draws["flip"].sum() < 2200
    assert set(draws["shift"].ravel()) == set(range(-3, 4))
    assert set(draws["hole"].ravel()) == set(range(32))
    both = [draw(Augmentation(mixup=1.0, cutmix=1.0), np.arange(4), 32, rng)["box"].any() for _ in range(400)]
    assert 120 < sum(both) < 260, "a batch draws mixup or cutmix"
    shares = [draw(Augmentation(mixup=0.2), np.arange(2), 32, rng)["share"][0] for _ in range(400)]
    assert np.mean([share < 0.1 or share > 0.9 for share in shares]) > 0.5, "a small alpha mixes little"


def test_without_an_augmentation_only_the_images_are_chosen() -> None:
    draws = draw(Augmentation(), np.array([3, 3, 0]), SIDE, np.random.default_rng(0))
    assert list(draws) == ["index"]
    assert np.array_equal(augmented(Augmentation(), draws), IMAGES[[3, 3, 0]])
