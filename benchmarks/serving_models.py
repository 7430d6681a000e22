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
import onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ml.models.catalog import build
from ml.models.vgg16_weights import Weights
from ml.training.export import export
from ml.training.recipe import load_recipe


def make(folder: Path) -> None:
    """Writes all of it."""
    images = np.load(folder / "images.npy")
    keras.utils.set_random_seed(0)
    model = build(load_recipe("vgg16", "report").model, Weights("random"))
    exported = export(model, folder / "keras", images[:64])
    shutil.move(exported.onnx, folder / "fp32.onnx")
    quantize(folder / "fp32.onnx", images, folder / "int8.onnx")
    shape = (-1, *images.shape[1:])
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
    )
    mlflow.keras.save_model(model, str(folder / "mlflow"), signature=signature, pip_requirements=[])


def quantize(fp32: Path, images: np.ndarray, target: Path) -> None:
    """Static int8 of an ONNX file: QDQ, a scale for each channel of the weights, calibrated on `images`."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        _Images(images, _input_name(fp32)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self, images: np.ndarray, name: str) -> None:
        batches = np.array_split(images.astype(np.float32), max(len(images) // 32, 1))
        self._feeds = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        return next(self._feeds, None)


def _input_name(path: Path) -> str:
    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
