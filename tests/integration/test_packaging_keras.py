"""The two forms of one registered version, as they come back from the registry, are one model."""

import numpy as np

from ml.evaluation.golden import write_golden
from ml.registry import tracking
from ml.registry.packaging import register
from ml.registry.versions import Registry
from ml.serving.engine import Engine
from tests.tiny_versions import STAND_IN, empty_registry, small_dataset


def test_keras_and_onnx_of_one_version_agree(settings, mlflow_uri, tmp_path):
    import keras

    from ml.training.export import export

    empty_registry(mlflow_uri)
    here = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.MaxPooling2D(4),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    exported = export(model, tmp_path / "exported", images)
    (tmp_path / "reference.parquet").touch()
    manifest = small_dataset(here)
    with tracking.run(here, "agreement") as run:
        version = register(
            run,
            exported=exported,
            metrics={"validation_accuracy": 0.5},
            recipe={"name": "agreement"},
            manifest=manifest,
            weights="from scratch",
            reference=tmp_path / "reference.parquet",
            golden=write_golden(tmp_path / "golden.npz", STAND_IN),
            int8="none",
            card="# Agreement\n",
            input_example=images[:2],
            data=manifest.data,
            architecture="baseline",
        )
    artifacts = Registry(mlflow_uri).fetch(version, here.cache_dir) / "artifacts"
    by_keras = keras.models.load_model(artifacts / "model.keras").predict(images.astype(np.float32), verbose=0)
    by_onnx = Engine(artifacts / "model.onnx").predict(images)
    assert np.abs(by_keras - by_onnx).max() < 1e-4
    assert np.ptp(by_onnx, axis=0).max() > 0, "a model that answers the same to everything would agree with itself"
