"""Corruptions: their contract for every one, and the formula of each where it can be computed another way."""

import colorsys

import numpy as np
import pytest

from ml.errors import InputInvalid
from ml.evaluation.corruptions import CORRUPTIONS, _disk, _plasma, corrupt


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth colour gradients with edges and some grain, like photographs more than like noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:32, 0:32] / 31
    waves = rng.uniform(1, 6, (12, 3, 2))
    smooth = np.stack([np.stack([np.sin(a * x + b * y) for a, b in image], axis=-1) for image in waves])
    smooth[:, 8:20, 10:24] += rng.uniform(-0.8, 0.8, (12, 1, 1, 3))
    return np.clip(128 + 70 * smooth + rng.normal(scale=5, size=smooth.shape), 0, 255).astype(np.uint8)


def test_the_promised_ones_are_there() -> None:
    assert {"fog", "gaussian_noise", "brightness", "contrast", "defocus_blur"} <= set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract(name: str, images: np.ndarray) -> None:
    before = images.copy()
    first = corrupt(images, name, 3, seed=5)
    assert np.array_equal(first, corrupt(images, name, 3, seed=5))
    assert first.dtype == np.uint8
    assert first.shape == images.shape
    assert np.array_equal(images, before)
    assert corrupt(images[:0], name, 3, seed=5).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_departs_further(name: str, images: np.ndarray) -> None:
    distance = [
        np.abs(corrupt(images, name, severity, seed=1).astype(float) - images).mean() for severity in range(1, 6)
    ]
    assert distance[0] > 0
    assert distance == sorted(distance)
    assert distance[4] > 1.5 * distance[0]


@pytest.mark.parametrize("name", ["fog", "gaussian_noise"])
def test_the_random_ones_follow_the_seed(name: str, images: np.ndarray) -> None:
    assert not np.array_equal(corrupt(images, name, 2, seed=1), corrupt(images, name, 2, seed=2))
    twice = corrupt(np.stack([images[0], images[0]]), name, 2, seed=1)
    assert not np.array_equal(twice[0], twice[1]), "every image has a draw of its own"


def test_noise_has_the_papers_scale() -> None:
    grey = np.full((40, 32, 32, 3), 128, dtype=np.uint8)
    spread = corrupt(grey, "gaussian_noise", 5, seed=0).astype(float).std() / 255
    assert spread == pytest.approx(0.10, rel=0.02)


def test_brightness_raises_v_of_hsv(images: np.ndarray) -> None:
    pixels = np.concatenate([images[0, 3], np.zeros((1, 3), np.uint8), np.full((1, 3), 250, np.uint8)])
    found = corrupt(np.broadcast_to(pixels, (1, 34, 34, 3)).copy(), "brightness", 4, seed=0)[0, 0]
    for pixel, new in zip(pixels, found, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        assert np.abs(np.array(colorsys.hsv_to_rgb(h, s, min(1, v + 0.2))) * 255 - new).max() <= 0.5 + 1e-9


def test_contrast_shrinks_around_the_mean(images: np.ndarray) -> None:
    changed = corrupt(images, "contrast", 2, seed=0)
    assert np.allclose(changed.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.5)
    assert np.allclose(changed.std(axis=(1, 2)), 0.5 * images.std(axis=(1, 2)), atol=0.5)


def test_blur_keeps_flat_areas_and_its_kernel_is_a_disk(images: np.ndarray) -> None:
    flat = np.full((1, 32, 32, 3), 77, dtype=np.uint8)
    assert np.array_equal(corrupt(flat, "defocus_blur", 5, seed=0), flat)
    kernel = _disk(1.5, 0.1)  # anti-aliasing of 0.1 pixels changes next to nothing: 3x3 of equal weights
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel[2:5, 2:5], 1 / 9, atol=1e-6)
    assert np.allclose(kernel, kernel[::-1])
    assert np.allclose(kernel, kernel.T)


def test_fog_veils_without_darkening_to_nothing(images: np.ndarray) -> None:
    foggy = corrupt(images, "fog", 5, seed=0).astype(float)
    assert foggy.std(axis=(1, 2, 3)).mean() < images.std(axis=(1, 2, 3)).mean()
    assert (foggy.max(axis=(1, 2, 3)) <= images.max(axis=(1, 2, 3))).all()


def test_plasma_fills_its_range_and_is_smoother_with_more_decay() -> None:
    rough, smooth = (_plasma(20, 32, decay, np.random.default_rng(0)) for decay in (1.75, 3.0))
    for maps in (rough, smooth):
        assert np.allclose(maps.min(axis=(1, 2)), 0)
        assert np.allclose(maps.max(axis=(1, 2)), 1)
    grain = [np.abs(np.diff(maps, n=2, axis=1)).mean() for maps in (rough, smooth)]
    assert grain[0] > 2 * grain[1]


@pytest.mark.parametrize(
    ("images", "name", "severity"),
    [
        (np.zeros((2, 32, 32, 3), np.uint8), "rain", 1),
        (np.zeros((2, 32, 32, 3), np.uint8), "fog", 0),
        (np.zeros((2, 32, 32, 3), np.uint8), "fog", 6),
        (np.zeros((2, 32, 32, 3), np.float32), "fog", 1),
        (np.zeros((32, 32, 3), np.uint8), "fog", 1),
        (np.zeros((2, 32, 32, 1), np.uint8), "fog", 1),
    ],
)
def test_what_cannot_be_corrupted_is_refused(images: np.ndarray, name: str, severity: int) -> None:
    with pytest.raises(InputInvalid):
        corrupt(images, name, severity, seed=0)
