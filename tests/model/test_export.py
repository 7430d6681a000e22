"""Export: Keras and ONNX files of one model, loaded as strangers load them."""

from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest

from ml.datasets.manifest import Split
from ml.errors import ModelInvalid, StorageError
from ml.models.catalog import build
from ml.models.specs import BaselineSpec
from ml.serving.engine import Engine
from ml.training.export import compare, export
from ml.training.fit import TrainedModel, train
from ml.training.recipe import BaselineRecipe

TINY = BaselineRecipe(name="tiny", epochs=1, learning_rate=0.01, model=BaselineSpec(filters=(8, 16), dense_units=16))


def test_baselines_two_files_are_one_model(train_split: Split, validation_split: Split, tmp_path: Path) -> None:
    _check_export(train(TINY, train_split, validation_split).model, validation_split, tmp_path)


def test_vgg16s_two_files_are_one_model(tiny_vgg16: TrainedModel, validation_split: Split, tmp_path: Path) -> None:
    _check_export(tiny_vgg16.model, validation_split, tmp_path)


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
