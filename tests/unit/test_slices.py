"""Accuracy by thirds of brightness and contrast."""

import numpy as np
import pytest
from scipy.stats import binomtest

from ml.errors import InputInvalid
from ml.evaluation.slices import by_brightness_and_contrast


def halves(low: int, high: int) -> np.ndarray:
    """An image of two flat halves: its mean is between them, its deviation half of what lies between."""
    image = np.full((32, 32, 3), low, np.uint8)
    image[16:] = high
    return image


def test_thirds_are_those_of_the_pixels_and_their_accuracies_are_counted():
    # Darkest to brightest, while contrast falls.
    images = np.stack([halves(0, 100), halves(20, 100), halves(60, 100), halves(90, 110), halves(118, 122)])
    labels, right = np.arange(5), np.array([True, False, True, True, False])
    given = np.eye(10)[np.where(right, labels, 9)]
    found = by_brightness_and_contrast(images, labels, given)
    assert [item.n for item in found] == [2, 2, 1] * 2
    assert [item.name for item in found[:3]] == [
        f"brightness, {part} third" for part in ("lowest", "middle", "highest")
    ]
    assert [item.accuracy for item in found] == [0.5, 1, 0, 0.5, 0.5, 1]
    assert (found[0].least, found[0].most) == (pytest.approx(50 / 255), pytest.approx(60 / 255))
    assert (found[3].least, found[5].most) == (pytest.approx(2 / 255), pytest.approx(50 / 255))
    expected = binomtest(1, 2).proportion_ci(0.95, method="wilson")
    assert (found[0].accuracy_low, found[0].accuracy_high) == pytest.approx((expected.low, expected.high))


def test_equals_are_split_all_the_same_and_few_images_fill_few_thirds():
    same = np.zeros((7, 32, 32, 3), np.uint8)
    assert [item.n for item in by_brightness_and_contrast(same, np.zeros(7, int), np.eye(10)[[0] * 7])] == [3, 2, 2] * 2
    assert [item.n for item in by_brightness_and_contrast(same[:1], np.zeros(1, int), np.eye(10)[[0]])] == [1, 1]


def test_what_does_not_belong_together_is_refused():
    for n, labels in ((3, 2), (0, 0)):
        with pytest.raises(InputInvalid):
            by_brightness_and_contrast(np.zeros((n, 32, 32, 3), np.uint8), np.zeros(labels, int), np.zeros((n, 10)))
