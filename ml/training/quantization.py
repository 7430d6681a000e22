"""Makes the int8 form of an exported model: the same graph with its convolutions and hidden dense layers in 8 bits.

Static and per channel: each output channel of a weight has a scale of its own, and the range of each activation is
what calibration images gave, so that nothing is measured while it serves. Whether that costs accuracy is not asked
here: the gate compares both forms on the test images (`ml.evaluation.engine_choice`).

Activations are unsigned and asymmetric, weights signed and symmetric: the one pair for which processors have an
instruction (VNNI), twice as fast as signed with signed; after ReLU no level is wasted on what is never negative. Left
in float32 is what costs accuracy and no time: the scaling of the pixels and the last dense layer with its softmax.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ml.datasets.labels import IMAGE_SHAPE
from ml.errors import ModelInvalid, StorageError
from ml.serving.engine import Engine

logger = logging.getLogger(__name__)

_QUANTIZED = ("Conv", "Gemm", "MaxPool", "Relu")
_BATCH = 32


def quantize(onnx_path: Path, destination: Path, images: np.ndarray) -> Path:
    """Writes the int8 form of `onnx_path` to `destination`, whole or not at all, and returns `destination`.

    It takes and gives what the float32 form does: float32 (batch, 32, 32, 3), raw RGB 0-255, of any batch size ->
    float32 (batch, 10), probabilities. The same images in another order give the same file.

    Args:
        onnx_path: what `ml.training.export.export` wrote.
        destination: its folder must exist.
        images: uint8 (n, 32, 32, 3), n >= 1, that the model was trained on: test images chosen here would have a part
            in what they judge.

    Raises:
        ModelInvalid: the model holds no layer that could be quantized, or has no int8 form that answers with
            probabilities.
        StorageError: the disk refuses.
    """
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE or images.dtype != np.uint8 or len(images) == 0:
        raise ModelInvalid(
            f"Ranges cannot be learnt from {images.dtype} {images.shape}.",
            fix="give one uint8 image (32, 32, 3) or more of the training split.",
        )
    try:
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".int8-") as name:
            prepared, draft = Path(name) / "prepared.onnx", Path(name) / destination.name
            with _failing_as_model_invalid(onnx_path.name):
                # Folds what follows a convolution directly into it; the shapes are known without symbols.
                quant_pre_process(str(onnx_path), str(prepared), skip_symbolic_shape=True)
                graph = onnx.load(prepared).graph
                given = graph.input[0].name
                quantize_static(
                    str(prepared),
                    str(draft),
                    _Calibration(given, images),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    op_types_to_quantize=list(_QUANTIZED),
                    nodes_to_exclude=_left_in_float32(graph),
                )
            _check(draft)
            shutil.move(draft, destination)
    except OSError as error:
        raise StorageError(
            f"The int8 model could not be written to {destination}: {error}.", fix="free some space there."
        ) from error
    logger.info(
        "quantized %s by %d images: %.2f MiB instead of %.2f",
        *(onnx_path.name, len(images), destination.stat().st_size / 2**20, onnx_path.stat().st_size / 2**20),
    )
    return destination


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Hands the images out in batches; ranges are smallest and largest values, so their order is of no matter."""

    def __init__(self, given: str, images: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(
            {given: images[start : start + _BATCH].astype(np.float32)} for start in range(0, len(images), _BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None when there is none."""
        return next(self._batches, None)


def _left_in_float32(graph: onnx.GraphProto) -> list[str]:
    """Names of nodes: the last dense layer, whose outputs become probabilities, and 1x1 colour arithmetic at the start.

    The last layer of 10 x 512 weights is a thousandth of the work, and a step of its outputs is a step of confidence.
    """
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    last = [node.name for node in graph.node if node.op_type == "Gemm"][-1:]
    colours = [
        node.name for node in graph.node if node.op_type == "Conv" and shapes.get(node.input[1], ())[1:] == (3, 1, 1)
    ]
    return last + colours


def _check(path: Path) -> None:
    graph = onnx.load(path).graph
    weights = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    if not any(node.op_type == "DequantizeLinear" and node.input[0] in weights for node in graph.node):
        raise ModelInvalid(
            "It has no int8 form: no layer of it could be quantized.",
            fix="a model of convolutions or of more than one dense layer has one; serve this one in float32.",
        )
    Engine(path, threads=1)  # looks at the signature, and answers a blank image


@contextmanager
def _failing_as_model_invalid(name: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # onnxruntime.quantization has no exceptions of its own: of a graph that it cannot treat it raises whatever
        # breaks first.
        said = (str(error).strip().splitlines() or [""])[0][:300]
        raise ModelInvalid(
            f"{name} has no int8 form ({type(error).__name__}: {said}).", fix="serve it in float32."
        ) from error
