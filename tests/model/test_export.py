"""Export: Keras and ONNX files of one model, loaded as strangers load them."""

from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers

from ml.datasets.manifest import Split
from ml.errors import ModelInvalid, StorageError
from ml.models.catalog import build
from ml.models.specs import BaselineSpec, Vgg16Spec
from ml.models.vgg16_weights import Weights
from ml.serving.engine import Engine
from ml.training.export import answers_of_keras, compare, export
from ml.training.fit import TrainedModel, train
from ml.training.onnx_graph import onnx_graph
from tests.model.conftest import BASELINE, first


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_baselines_two_files_are_one_model(
    precision: str, train_split: Split, validation_split: Split, tmp_path: Path
) -> None:
    recipe = BASELINE.with_overrides({"precision": precision, "stages.fit.epochs": 1})
    _check_export(train(recipe, train_split, validation_split).model, validation_split, tmp_path)
    loaded = keras.saving.load_model(tmp_path / "out" / "model.keras")
    assert {layer.dtype_policy.name for layer in loaded.layers} == {"float32"}


def test_vgg16s_two_files_are_one_model(tiny_vgg16: TrainedModel, validation_split: Split, tmp_path: Path) -> None:
    _check_export(tiny_vgg16.model, validation_split, tmp_path)


def test_vgg16_on_enlarged_images_is_one_model_too(validation_split: Split, tmp_path: Path) -> None:
    keras.utils.set_random_seed(2)
    model = build(Vgg16Spec(input_size=64, dense_units=16), Weights("random"))
    _check_export(model, first(validation_split, 8), tmp_path)


def _check_export(model: keras.Model, validation_split: Split, tmp_path: Path) -> None:
    exported = export(model, tmp_path / "out", validation_split.images)
    assert exported.max_difference < 1e-4
    assert exported.compared >= 64
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.keras", "model.onnx"]

    images = validation_split.images[:64]
    expected = model.predict(images, verbose=0)
    loaded = keras.saving.load_model(exported.keras)  # safe mode, no custom objects
    assert not loaded.compiled, "an optimizer would triple the file"
    assert np.allclose(loaded.predict(images, verbose=0), expected, atol=1e-6)
    # As the server runs it: uint8 and float32 alike, any batch.
    engine = Engine(exported.onnx)
    assert np.abs(engine.predict(images) - expected).max() < 1e-4
    assert np.abs(engine.predict(images[:3].astype(np.float32)) - expected[:3]).max() < 1e-4
    (given,) = onnxruntime.InferenceSession(exported.onnx).get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(float)", [32, 32, 3])
    assert not isinstance(given.shape[0], int)


def test_files_of_different_models_are_refused(tmp_path: Path, validation_split: Split) -> None:
    files = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        files.append(export(build(BaselineSpec(filters=(4,))), tmp_path / str(seed), validation_split.images[:64]))
    assert compare(files[0].keras, files[0].onnx, validation_split.images)[0] < 1e-4
    with pytest.raises(ModelInvalid, match="disagree"):
        compare(files[0].keras, files[1].onnx, validation_split.images)


def test_a_keras_file_that_cannot_be_used_is_the_models_fault(tmp_path: Path, validation_split: Split) -> None:
    images = validation_split.images[:2].astype(np.float32)
    exported = export(build(BaselineSpec(filters=(4,))), tmp_path, validation_split.images[:2])
    broken, narrow = tmp_path / "broken.keras", tmp_path / "narrow.keras"
    broken.write_bytes(exported.keras.read_bytes()[:1000])
    keras.Sequential([keras.Input((32, 32, 3)), layers.Flatten(), layers.Dense(9, activation="softmax")]).save(narrow)
    with pytest.raises(ModelInvalid, match=r"Keras cannot use broken\.keras"):
        answers_of_keras(broken, images)
    with pytest.raises(ModelInvalid, match=r"Keras file gives \(2, 9\)"):
        answers_of_keras(narrow, images)


def test_nan_weights_are_refused_and_leave_nothing(tmp_path: Path, validation_split: Split) -> None:
    model = build(BaselineSpec(filters=(4,)))
    model.get_layer("dense").set_weights([np.full_like(w, np.nan) for w in model.get_layer("dense").get_weights()])
    with pytest.raises(ModelInvalid):
        export(model, tmp_path / "out", validation_split.images)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_is_said(tmp_path: Path, validation_split: Split) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        export(build(BaselineSpec(filters=(4,))), tmp_path / "file", validation_split.images)


def test_the_graph_follows_every_setting_of_the_layers_it_knows(tmp_path: Path) -> None:
    """Strides, uneven padding, no bias, no scale, an offset, enlargements: against Keras on noise."""
    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.UpSampling2D((2, 3), interpolation="bilinear")(x)
    x = layers.Conv2D(5, (2, 4), padding="same", activation="relu")(x)
    x = layers.UpSampling2D(2, interpolation="nearest")(x)
    x = layers.Conv2D(6, 3, strides=3, padding="valid")(x)
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Flatten()(x)
    x = layers.BatchNormalization(center=False)(x)
    x = layers.Dense(7, activation="relu", use_bias=False)(x)
    model = keras.Model(image, layers.Dense(10, activation="softmax")(layers.Dropout(0.5)(x)))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([np.random.default_rng(1).uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    onnx.save_model(onnx_graph(model), tmp_path / "graph.onnx")
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    assert np.abs(Engine(tmp_path / "graph.onnx").predict(noise) - model.predict(noise, verbose=0)).max() < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(name="odd"),
        layers.Conv2D(3, 3, dilation_rate=2, name="odd"),
        layers.Dense(3, activation="gelu", name="odd"),
    ],
)
def test_a_layer_without_a_form_is_named(layer: layers.Layer) -> None:
    image = keras.Input((32, 32, 3))
    model = keras.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(layer(image))))
    with pytest.raises(ModelInvalid, match="'odd'"):
        onnx_graph(model)


def test_a_model_that_branches_is_refused() -> None:
    image = keras.Input((32, 32, 3))
    with pytest.raises(ModelInvalid, match="not a chain"):
        onnx_graph(keras.Model(image, layers.Add()([layers.Conv2D(3, 1)(image), image])))
