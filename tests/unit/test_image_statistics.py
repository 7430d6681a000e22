"""The five image statistics against independent implementations: scipy's convolution, colorsys, known noise."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ml.monitoring.image_statistics import STATISTIC_NAMES, image_statistics


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(7).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def smooth(images):
    return np.stack([ndimage.gaussian_filter(image, (2, 2, 0)) for image in images])


def luma(image):
    return image.astype(float) @ [0.299, 0.587, 0.114] / 255


def test_names_order_and_type(images):
    got = image_statistics(images)
    assert tuple(got) == STATISTIC_NAMES == ("brightness", "contrast", "sharpness", "saturation", "noise")
    assert all(values.dtype == np.float32 and values.shape == (40,) for values in got.values())


def test_brightness_is_pillows_luma(images):
    expected = [np.asarray(Image.fromarray(image).convert("L")).mean() / 255 for image in images]
    np.testing.assert_allclose(image_statistics(images)["brightness"], expected, atol=2e-3)  # Pillow rounds a pixel


def test_contrast_is_the_spread_of_luma(images):
    np.testing.assert_allclose(image_statistics(images)["contrast"], [luma(i).std() for i in images], rtol=1e-4)


def test_sharpness_is_the_spread_of_scipys_laplacian(images):
    expected = [ndimage.laplace(luma(i))[1:-1, 1:-1].std() for i in images]
    np.testing.assert_allclose(image_statistics(images)["sharpness"], expected, rtol=1e-4)


def test_saturation_is_colorsys(images):
    expected = [np.mean([colorsys.rgb_to_hsv(*p)[1] for p in i.reshape(-1, 3) / 255]) for i in images[:5]]
    np.testing.assert_allclose(image_statistics(images[:5])["saturation"], expected, rtol=1e-4)


def test_noise_is_immerkaers_convolution(images):
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    expected = [
        np.sqrt(np.pi / 2) / (6 * 30 * 30) * np.abs(ndimage.convolve(luma(i), mask)[1:-1, 1:-1]).sum() for i in images
    ]
    np.testing.assert_allclose(image_statistics(images)["noise"], expected, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_noise_finds_the_sigma_that_was_added(sigma):
    grey = 0.5 + np.random.default_rng(1).normal(0, sigma, (200, 32, 32, 1))
    noisy = np.repeat(np.clip(np.rint(grey * 255), 0, 255), 3, axis=3).astype(np.uint8)
    assert image_statistics(noisy)["noise"].mean() == pytest.approx(sigma, rel=0.05)


def test_each_statistic_answers_to_its_own_change(smooth):
    before = image_statistics(smooth)
    brighter = image_statistics(np.clip(smooth.astype(int) + 60, 0, 255).astype(np.uint8))
    assert (brighter["brightness"] > before["brightness"] + 0.1).all()
    flatter = image_statistics((smooth // 2 + 60).astype(np.uint8))
    assert (flatter["contrast"] < before["contrast"]).all()
    assert (flatter["saturation"] < before["saturation"]).all()
    blurred = image_statistics(np.stack([ndimage.gaussian_filter(i, (2, 2, 0)) for i in smooth]))
    assert (blurred["sharpness"] < before["sharpness"]).all()


def test_black_and_flat_images_are_zero_and_finite():
    got = image_statistics(np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 200, np.uint8)]))
    np.testing.assert_allclose(got["brightness"], [0, 200 / 255], atol=1e-6)
    for name in ("contrast", "sharpness", "saturation", "noise"):
        np.testing.assert_allclose(got[name], 0, atol=1e-6)


def test_an_image_has_the_same_numbers_alone_and_in_a_large_batch(images):
    many = image_statistics(np.concatenate([images] * 30))
    alone = image_statistics(images[3:4])
    for name in STATISTIC_NAMES:
        assert many[name][3] == many[name][3 + 40 * 29] == alone[name][0]


def test_no_images_give_empty_columns():
    assert all(len(v) == 0 for v in image_statistics(np.zeros((0, 32, 32, 3), np.uint8)).values())


@pytest.mark.parametrize("wrong", [np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32)])
def test_a_wrong_array_is_a_programming_error(wrong):
    with pytest.raises(ValueError, match="uint8"):
        image_statistics(wrong)
