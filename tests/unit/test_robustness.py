"""Robustness: the grid's figures by hand, what they must not depend on, and the interval against simulation."""

import json
import logging

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from ml.errors import InputInvalid
from ml.evaluation import robustness as module
from ml.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ml.evaluation.metrics import wilson_interval
from ml.evaluation.robustness import Robustness, mean_interval, robustness


def _says(classes: np.ndarray) -> np.ndarray:
    return np.eye(10)[classes]


def _by_mean(images: np.ndarray) -> np.ndarray:
    """A model that sees brightness alone: class 0 for black to 9 for white."""
    return _says(np.minimum(images.mean(axis=(1, 2, 3)) / 25.6, 9).astype(int))


@pytest.fixture
def images() -> np.ndarray:
    rng = np.random.default_rng(4)
    levels = rng.integers(0, 256, (24, 1, 1, 3))
    return np.clip(levels + rng.normal(scale=20, size=(24, 32, 32, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def labels(images: np.ndarray) -> np.ndarray:
    return _by_mean(images).argmax(axis=1)


def test_a_hand_computed_case() -> None:
    """Grey images, and a model that says class 3 until they are brightened by more than 30 levels."""
    images = np.stack([np.full((32, 32, 3), level, dtype=np.uint8) for level in (100, 110, 120, 130)])
    labels = np.array([3, 3, 3, 5])

    def predict(corrupted: np.ndarray) -> np.ndarray:
        clean = np.array([100, 110, 120, 130])
        return _says(np.where(corrupted[:, 0, 0, 0] - clean > 30, 5, 3))

    # Brightness adds 0.05, 0.1, 0.15 of 255: 13, 26, 38. Pixelating a flat image changes nothing.
    found = robustness(predict, images, labels, corruptions=["brightness", "pixelate"], severities=[1, 2, 3], seed=0)
    assert found.n == 4
    assert found.cells == {
        ("brightness", 1): 0.75, ("brightness", 2): 0.75, ("brightness", 3): 0.25,
        ("pixelate", 1): 0.75, ("pixelate", 2): 0.75, ("pixelate", 3): 0.75,
    }  # fmt: skip
    assert found.by_corruption == {"brightness": pytest.approx(1.75 / 3), "pixelate": pytest.approx(0.75)}
    assert found.mean_accuracy == pytest.approx(4 / 6)
    # Images are right in 5, 5, 5 and 1 of 6 cells: s = 1/3, t(0.975, 3) = 3.182, so ± 0.530, cut at 1.
    assert found.mean_accuracy_low == pytest.approx(4 / 6 - 3.1824463 / 6, abs=1e-6)
    assert found.mean_accuracy_high == 1


def test_each_cell_is_the_accuracy_on_its_corruption(images: np.ndarray, labels: np.ndarray) -> None:
    found = robustness(_by_mean, images, labels, seed=3)
    assert set(found.cells) == {(name, severity) for name in CORRUPTIONS for severity in SEVERITIES}
    for name in ("contrast", "jpeg_compression", "zoom_blur"):  # those that draw nothing
        expected = (_by_mean(corrupt(images, name, 4, seed=0)).argmax(axis=1) == labels).mean()
        assert found.cells[name, 4] == expected
    assert found.mean_accuracy == pytest.approx(np.mean(list(found.cells.values())))
    assert found.mean_accuracy == pytest.approx(np.mean(list(found.by_corruption.values())))
    assert found.mean_accuracy_low < found.mean_accuracy < found.mean_accuracy_high


def test_order_of_rows_does_not_matter(images: np.ndarray, labels: np.ndarray) -> None:
    images[5] = images[6]  # two alike, with different labels
    labels[5] = (labels[6] + 1) % 10
    some = {"corruptions": ["fog", "shot_noise", "frost", "elastic_transform"], "severities": [2, 5], "seed": 1}
    order = np.random.default_rng(0).permutation(len(images))
    assert robustness(_by_mean, images, labels, **some) == robustness(_by_mean, images[order], labels[order], **some)


def test_a_cell_does_not_depend_on_the_others(images: np.ndarray, labels: np.ndarray) -> None:
    few = robustness(_by_mean, images, labels, corruptions=["snow"], severities=[4], seed=2)
    more = robustness(_by_mean, images, labels, corruptions=["gaussian_noise", "snow"], severities=[5, 4], seed=2)
    assert few.cells["snow", 4] == more.cells["snow", 4]


def test_cells_draw_apart_and_by_the_seed() -> None:
    grey = np.full((2, 32, 32, 3), 128, dtype=np.uint8)

    def noises(seed: int) -> list[np.ndarray]:
        seen: list[np.ndarray] = []

        def predict(corrupted: np.ndarray) -> np.ndarray:
            seen.append(corrupted.astype(float) - 128)
            return _says(np.zeros(2, dtype=int))

        robustness(predict, grey, np.zeros(2, dtype=int), corruptions=["gaussian_noise"], severities=[4, 5], seed=seed)
        return seen

    first, second = noises(0)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert np.array_equal(first, noises(0)[0])
    assert not np.array_equal(first, noises(1)[0])


def test_images_are_handed_over_as_they_were(images: np.ndarray, labels: np.ndarray) -> None:
    before = images.copy()

    def predict(corrupted: np.ndarray) -> np.ndarray:
        assert corrupted.dtype == np.uint8
        assert corrupted.shape == images.shape
        return _by_mean(corrupted).astype(np.float32)

    robustness(predict, images, labels, corruptions=["impulse_noise"], seed=0)
    assert np.array_equal(images, before)


def test_as_dict_goes_through_json(images: np.ndarray, labels: np.ndarray) -> None:
    found = robustness(_by_mean, images, labels, corruptions=["contrast", "fog"], severities=[1, 5], seed=0)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["cells"]["fog"]["5"] == found.cells["fog", 5]
    assert set(plain) == set(Robustness.__dataclass_fields__) - {"accuracy_per_image"}
    assert plain == found.as_dict()


def test_the_interval_is_students(images: np.ndarray) -> None:
    shares = np.random.default_rng(0).beta(2, 1, 400)
    reference = ttest_1samp(shares, 0).confidence_interval(0.95)
    assert mean_interval(shares) == pytest.approx((reference.low, reference.high))


def test_the_interval_covers_the_truth_where_cells_go_together() -> None:
    """Images right in all 75 cells or in none: an interval that took cells for independent would be far too narrow."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        skill = rng.beta(1.6, 0.4, 200)  # mean 0.8
        low, high = mean_interval(rng.binomial(75, skill) / 75)
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(("shares", "successes"), [(np.ones(50), 50), (np.zeros(50), 0), (np.array([1.0]), 1)])
def test_the_interval_does_not_vanish_where_all_images_are_alike(shares: np.ndarray, successes: int) -> None:
    assert mean_interval(shares) == wilson_interval(successes, len(shares))


def test_progress_is_logged(
    images: np.ndarray, labels: np.ndarray, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="ml.evaluation.robustness")
    robustness(_by_mean, images, labels, corruptions=["contrast"], seed=0)
    assert len(caplog.messages) == 1, "the end alone, when it takes no five seconds"
    monkeypatch.setattr(module, "_LOG_EVERY_S", 0)
    robustness(_by_mean, images, labels, corruptions=["contrast"], seed=0)
    assert "2 of 5 cells" in caplog.text
    assert "images/s" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": np.zeros((0, 32, 32, 3), np.uint8), "labels": np.zeros(0, int)},
        {"images": np.zeros((2, 32, 32, 3), np.float32)},
        {"images": np.zeros((2, 16, 16, 3), np.uint8)},
        {"labels": np.array([0, 10])},
        {"labels": np.array([0, -1])},
        {"labels": np.array([0])},
        {"labels": np.array([0.0, 1.0])},
        {"corruptions": []},
        {"corruptions": ["rain"]},
        {"corruptions": ["fog", "fog"]},
        {"severities": []},
        {"severities": [0]},
        {"seed": -1},
        {"predict": lambda images: np.zeros((len(images), 9))},
        {"predict": lambda images: np.full((len(images), 10), np.nan)},
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict) -> None:
    good = {"predict": _by_mean, "images": np.zeros((2, 32, 32, 3), np.uint8), "labels": np.array([0, 1])}
    given = good | {"corruptions": ["contrast"], "seed": 0} | wrong
    with pytest.raises(InputInvalid):
        robustness(given.pop("predict"), given.pop("images"), given.pop("labels"), **given)
