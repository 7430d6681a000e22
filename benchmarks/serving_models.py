"""Makes what all contenders of the serving benchmark serve: one VGG16 as Keras, MLflow, ONNX and int8 ONNX.

A process of its own, so that TensorFlow's memory is gone when it ends: `python -m benchmarks.serving_models FOLDER`
reads FOLDER/images.npy, uint8 (n, 32, 32, 3), and writes FOLDER/keras/model.keras, fp32.onnx, int8.onnx and mlflow/.
Weights are random: what they are changes no speed.
"""

import shutil
import sys
from pathlib import Path

import keras
import mlflow.keras
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from ml.models.catalog import build
from ml.models.vgg16_weights import Weights
from ml.training.export import export
from ml.training.quantization import quantize
from ml.training.recipe import load_recipe


def make(folder: Path) -> None:
    """Writes all of it."""
    images = np.load(folder / "images.npy")
    keras.utils.set_random_seed(0)
    model = build(load_recipe("vgg16", "report").model, Weights("random"))
    exported = export(model, folder / "keras", images[:64])
    shutil.move(exported.onnx, folder / "fp32.onnx")
    quantize(folder / "fp32.onnx", folder / "int8.onnx", images)
    shape = (-1, *images.shape[1:])
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
    )
    mlflow.keras.save_model(model, str(folder / "mlflow"), signature=signature, pip_requirements=[])


if __name__ == "__main__":
    make(Path(sys.argv[1]))
