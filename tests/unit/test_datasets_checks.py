"""Each check finds its fault, and good data passes."""

from dataclasses import replace

import numpy as np
import pytest

from ml.datasets.checks import check, faults_of
from ml.datasets.synthetic import generate
from ml.errors import DatasetInvalid

RAW = generate(100, 50)


def test_good_data_passes() -> None:
    check(RAW)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (RAW.train_images[:, :28, :28], RAW.train_labels, "shape"),
        (RAW.train_images.astype(np.float32), RAW.train_labels, "float32, expected uint8"),
        (RAW.train_images, RAW.train_labels.astype(float), "expected integers"),
        (RAW.train_images, RAW.train_labels[:-1], "100 images but 99 labels"),
        (RAW.train_images[:0], RAW.train_labels[:0], "no images"),
        (RAW.train_images // 255, RAW.train_labels, "scaled to 0-1"),
        (RAW.train_images // 8 + 100, RAW.train_labels, "spread over 0-255"),
        (RAW.train_images, np.where(np.arange(100) == 7, 10, RAW.train_labels), "the first is 10 at image 7"),
        (RAW.train_images, np.where(np.arange(100) == 0, -1, RAW.train_labels), "the first is -1"),
        (RAW.train_images, np.where(RAW.train_labels == 3, 4, RAW.train_labels), "class 3 has 0, class 4 has 20"),
    ],
)
def test_a_fault_is_named(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    (fault,) = faults_of(images, labels)
    assert message in fault


def test_balance_is_held_to_the_tolerance() -> None:
    labels = RAW.train_labels.copy()
    labels[np.flatnonzero(labels == 0)[:2]] = 1  # 8 and 12 of an even 10
    assert faults_of(RAW.train_images, labels, tolerance=0.2) == []
    assert faults_of(RAW.train_images, labels, tolerance=0.19) != []


def test_all_faults_are_told_at_once() -> None:
    wrong = replace(RAW, train_labels=RAW.train_labels + 1, test_images=RAW.test_images // 255)
    with pytest.raises(DatasetInvalid) as error:
        check(wrong)
    assert "train: 10 labels lie outside 0-9" in error.value.message
    assert "test: pixels lie in 0-1" in error.value.message
