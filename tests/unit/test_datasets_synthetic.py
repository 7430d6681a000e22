"""The stand-in: reproducible, balanced, labelled, learnable and not trivial."""

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier

from ml.datasets.checks import check
from ml.datasets.splits import content_ids
from ml.datasets.synthetic import generate


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = generate(50, 20), generate(50, 20), generate(50, 20, seed=1)
    assert content_ids(first.train_images) == content_ids(again.train_images)
    np.testing.assert_array_equal(first.test_labels, again.test_labels)
    assert not set(content_ids(first.train_images)) & set(content_ids(other.train_images))
    assert not set(content_ids(first.train_images)) & set(content_ids(first.test_images))


def test_it_says_what_it_is_and_passes_the_checks() -> None:
    raw = generate(200, 100)
    check(raw)
    assert raw.data == "SYNTHETIC"
    assert raw.source_checksums == {}
    assert np.bincount(raw.train_labels).tolist() == [20] * 10


@pytest.mark.filterwarnings("error")
def test_classes_can_be_told_apart_and_not_perfectly() -> None:
    raw = generate(3000, 500)

    def features(images: np.ndarray) -> np.ndarray:
        # Grey, centred on its own mean, at half size: no more than a CNN's first layers see.
        grey = images.mean(axis=3).reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))
        return np.abs(grey - np.median(grey, axis=(1, 2), keepdims=True)).reshape(len(images), -1)

    forest = ExtraTreesClassifier(100, n_jobs=2, random_state=0).fit(features(raw.train_images), raw.train_labels)
    accuracy = forest.score(features(raw.test_images), raw.test_labels)
    assert 0.25 < accuracy < 0.95  # chance is 0.1; a convolutional net does better than a forest
