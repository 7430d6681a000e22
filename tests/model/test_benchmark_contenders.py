"""The training benchmark's contenders measure what they say, at the speed of a test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import training_contenders
from ml.datasets.manifest import Split
from ml.training.recipe import Recipe
from tests.model.conftest import BASELINE, TINY_VGG16


class EnoughError(Exception):
    pass


class Heard:
    """Notes what a contender tells, and ends it after so many samples."""

    def __init__(self, wanted: int) -> None:
        self.samples: list[Mapping[str, Any]] = []
        self._wanted = wanted

    def __call__(self, sample: Mapping[str, Any]) -> None:
        self.samples.append(sample)
        if len(self.samples) == self._wanted:
            raise EnoughError


@pytest.fixture
def images(tmp_path: Path, train_split: Split) -> Path:
    np.save(tmp_path / "images.npy", train_split.images)
    np.save(tmp_path / "labels.npy", train_split.labels)
    return tmp_path


def job(recipe: Recipe, images: Path, **more: Any) -> dict[str, Any]:
    return {"recipe": recipe.model_dump(mode="json"), "data": str(images), "images": 320, **more}


@pytest.mark.parametrize("steps", [3, None])
def test_plain_keras_tells_a_rate_whenever_it_is_asked(images: Path, steps: int | None) -> None:
    heard = Heard(2)
    with pytest.raises(EnoughError):
        training_contenders.plain(job(BASELINE, images, steps=steps), heard)
    assert [sample["first"] for sample in heard.samples] == [True, False]
    assert all(0 < sample[rate] < 1e6 for sample in heard.samples for rate in ("between_batches", "images_per_second"))


def test_ours_tells_the_prefix_and_then_the_tail_and_trains_on_all_images(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks of 64 run through the frozen layers; the other images take copies of what those gave."""
    monkeypatch.setattr(training_contenders, "_CHUNK", 64)
    monkeypatch.setattr("ml.training.fit._EXTRACTION_BATCH", 64)
    top = TINY_VGG16.model_copy(update={"stages": TINY_VGG16.stages[1:]})
    heard = Heard(99)
    training_contenders.ours(job(top, images, chunks=2), heard)
    told = [(sample["kind"], sample["first"]) for sample in heard.samples]
    assert told == [("extraction", True), ("extraction", False), ("fit", True), ("fit", False)]
    assert all(sample["images_per_second"] > 0 for sample in heard.samples)


def test_the_rest_of_the_features_are_copies(tmp_path: Path) -> None:
    cache = training_contenders._SampledCache(tmp_path, chunks=2, say=Heard(99))

    def fill(features: np.ndarray) -> None:
        for start in range(0, len(features), 300):
            features[start : start + 300] = np.arange(start, min(start + 300, len(features)))[:, None]

    found = cache.array("a", (1000, 1), fill)
    assert found[:, 0].tolist() == [i % 600 for i in range(1000)]
