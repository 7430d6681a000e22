"""The MLflow model (models-from-code): what `mlflow models serve` and `mlflow.pyfunc.load_model` run.

MLflow copies this one file into every version, so it imports nothing of `ml` and needs ONNX Runtime and numpy alone.
Preprocessing is inside the ONNX graph: raw pixels in, probabilities out. The project's own server does not use it.
"""

from typing import Any

import numpy as np
import onnxruntime
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class OnnxClassifier(PythonModel):  # type: ignore[misc]  # mlflow is not typed
    """Class probabilities of 32x32 RGB images."""

    def load_context(self, context: Any) -> None:
        """Opens the ONNX file that lies in the version's artifacts."""
        self._session = onnxruntime.InferenceSession(
            context.artifacts["model.onnx"], providers=["CPUExecutionProvider"]
        )

    # An array as the hint: MLflow takes hints of other types for a signature, and the version has its own.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Probabilities, float32 (n, 10), of images, raw RGB in 0-255 as uint8 or float32 (n, 32, 32, 3)."""
        given = self._session.get_inputs()[0]
        dtype = np.uint8 if given.type == "tensor(uint8)" else np.float32
        return self._session.run(None, {given.name: np.ascontiguousarray(model_input, dtype=dtype)})[0]


set_model(OnnxClassifier())
