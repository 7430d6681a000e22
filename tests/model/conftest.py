"""What the model tests share. All of them run in one process: TensorFlow takes eleven seconds to import."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from pathlib import Path

import h5py
import numpy as np
import pytest

from ml.datasets.manifest import Split
from ml.models.specs import BaselineSpec, Vgg16Spec
from ml.models.vgg16_weights import Weights
from ml.training.feature_cache import FeatureCache
from ml.training.fit import TrainedModel, train
from ml.training.recipe import BaselineRecipe, Stage, Vgg16Recipe

BASELINE = BaselineRecipe(
    name="tiny",
    batch_size=32,
    model=BaselineSpec(filters=(8, 8), dense_units=16, dropout=0.1, block_dropout=0.1, batch_norm_momentum=0.5),
    stages=(Stage(name="fit", epochs=2, learning_rate=0.01),),
)
TINY_VGG16 = Vgg16Recipe(
    name="tiny",
    batch_size=32,
    model=Vgg16Spec(dense_units=16, dropout=0.3),
    stages=(
        Stage(name="head", epochs=2, learning_rate=0.003, unfreeze_from="dense"),
        Stage(name="top", epochs=2, learning_rate=0.0001, unfreeze_from="block5_conv1"),
    ),
)


def coloured(n: int, seed: int) -> Split:
    """Easy images: the class is a colour, with noise. A model that learns at all learns these."""
    rng = np.random.default_rng(seed)
    palette = np.random.default_rng(0).integers(30, 226, (10, 3))
    labels = np.arange(n, dtype=np.int64) % 10
    images = palette[labels][:, None, None, :] + rng.normal(scale=25, size=(n, 32, 32, 3))
    return Split(np.clip(images, 0, 255).astype(np.uint8), labels, tuple(str(i) for i in range(n)))


@pytest.fixture(scope="session")
def train_split() -> Split:
    return coloured(320, 1)


@pytest.fixture(scope="session")
def validation_split() -> Split:
    return coloured(100, 2)


def first(split: Split, n: int) -> Split:
    return Split(split.images[:n], split.labels[:n], split.ids[:n])


def figures(trained: TrainedModel) -> list[list[dict[str, float]]]:
    """What each stage measured in each epoch; how fast it was left out."""
    return [
        [{key: value for key, value in epoch.items() if key != "images_per_second"} for epoch in stage.epochs]
        for stage in trained.stages
    ]


@pytest.fixture(scope="session")
def vgg16_features(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Shared, so that the frozen layers of VGG16 run once in this session."""
    return FeatureCache(tmp_path_factory.mktemp("features"), 2**30)


@pytest.fixture(scope="session")
def tiny_vgg16(train_split: Split, validation_split: Split, vgg16_features: FeatureCache) -> TrainedModel:
    """Both stages on 64 images, through the cache of frozen features; watched on 32."""
    return train(
        TINY_VGG16, first(train_split, 64), first(validation_split, 32), Weights("random"), features=vgg16_features
    )


def published_layout(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Writes weights as Keras publishes them: a group per layer, `layer_names` and `weight_names` as attributes."""
    pools = [f"block{i}_pool" for i in range(1, 6)]
    with h5py.File(path, "w") as file:
        names = ["input_1", *sorted([*layers, *pools])]
        file.attrs["layer_names"] = [name.encode() for name in names]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"1.1.1"
        for name in names:
            group = file.create_group(name)
            own = [(f"{name}_W_1:0", 0), (f"{name}_b_1:0", 1)] if name in layers else []
            group.attrs["weight_names"] = [key.encode() for key, _ in own]
            for key, index in own:
                group[key] = layers[name][index]
    return path


VGG16_SHAPES: dict[str, tuple[int, int]] = {
    f"block{block}_conv{conv}": (before if conv == 1 else width, width)
    for block, (count, before, width) in enumerate(
        [(2, 3, 64), (2, 64, 128), (3, 128, 256), (3, 256, 512), (3, 512, 512)], start=1
    )
    for conv in range(1, count + 1)
}
"""Filters in and out of each convolution, from the paper's configuration D."""


@pytest.fixture(scope="session")
def notop_weights() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    return {
        name: (
            rng.standard_normal((3, 3, *shape), dtype=np.float32) * np.float32(np.sqrt(2 / (9 * shape[0]))),
            rng.standard_normal(shape[1], dtype=np.float32) * np.float32(0.01),
        )
        for name, shape in VGG16_SHAPES.items()
    }


@pytest.fixture(scope="session")
def notop_file(
    notop_weights: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return published_layout(tmp_path_factory.mktemp("weights") / "notop.h5", notop_weights)
