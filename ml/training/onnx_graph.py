"""The ONNX graph of a trained model, written layer by layer.

`keras.Model.export(format="onnx")` goes through tf2onnx, which copies the weights as constants through some thirty
passes: for VGG16 that took 10 to 40 s and 3.4 GB beyond the model's own memory (measured on two cores), where writing
the same nodes directly takes a second and one copy. The models here are chains of a few standard layers, and
`ml.training.export` compares both files on images at every export, so a layer that were written wrongly cannot pass.

Images come in Keras' order (row, column, channel); ONNX convolves channels first, so the graph turns them once at the
first spatial layer, and back before they are flattened.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import onnx
from keras import layers
from onnx import TensorProto, helper, numpy_helper

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import ModelInvalid
from ml.models.chain import chain_of

OPSET = 17
IR_VERSION = 8
"""What opset 17 came with: ONNX Runtime reads it since 1.12."""
INPUT, OUTPUT = "image", "probabilities"


@dataclass
class _Graph:
    """A chain under construction: `last` is the name of the tensor that the next node takes."""

    last: str = INPUT
    channels_first: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, kind: str, name: str, constants: dict[str, np.ndarray] | None = None, **attributes: Any) -> None:
        """Appends a node that takes the last tensor, then `constants`."""
        inputs = [self.last]
        for key, value in (constants or {}).items():
            self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), f"{name}/{key}"))
            inputs.append(f"{name}/{key}")
        self.last = f"{name}/out"
        self.nodes.append(helper.make_node(kind, inputs, [self.last], name, **attributes))

    def turn(self, channels_first: bool, name: str) -> None:
        """Brings the last tensor into the order that the next node needs."""
        if self.channels_first != channels_first:
            self.add("Transpose", f"{name}/turn", perm=[0, 3, 1, 2] if channels_first else [0, 2, 3, 1])
            self.channels_first = channels_first


def onnx_graph(model: keras.Model) -> onnx.ModelProto:
    """The model for inference: float32 (batch, 32, 32, 3), raw 0-255, batch of any size -> float32 (batch, 10).

    Raises:
        ModelInvalid: the model is no chain, or holds a layer or a setting of one that has no form here.
    """
    graph = _Graph()
    try:
        steps = chain_of(model)
    except ValueError as error:
        raise ModelInvalid(f"No ONNX graph: {error}.", fix="build the model as a chain of layers.") from error
    for layer in steps:
        write = _WRITERS.get(type(layer))
        if write is None:
            raise _no_form(layer, f"{type(layer).__name__} layers")
        write(graph, layer)
    graph.nodes.append(helper.make_node("Identity", [graph.last], [OUTPUT], "output"))
    body = helper.make_graph(
        graph.nodes,
        model.name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *IMAGE_SHAPE])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", NUM_CLASSES])],
        graph.constants,
    )
    made = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="cifar10")
    made.ir_version = IR_VERSION
    onnx.checker.check_model(made)
    return made


def _rescaling(graph: _Graph, layer: layers.Rescaling) -> None:
    graph.add("Mul", layer.name, {"scale": np.asarray(layer.scale)})
    if np.any(layer.offset):
        graph.add("Add", f"{layer.name}/shift", {"offset": np.asarray(layer.offset)})


def _enlargement(graph: _Graph, layer: layers.UpSampling2D) -> None:
    graph.turn(True, layer.name)
    mode = {"bilinear": "linear", "nearest": "nearest"}[layer.interpolation]
    # Of Resize's inputs the second, the region of interest, is left out.
    graph.constants.append(numpy_helper.from_array(np.array([1, 1, *layer.size], np.float32), f"{layer.name}/scales"))
    inputs, graph.last = [graph.last, "", f"{layer.name}/scales"], f"{layer.name}/out"
    graph.nodes.append(
        helper.make_node(
            "Resize", inputs, [graph.last], layer.name, mode=mode, coordinate_transformation_mode="half_pixel"
        )
    )


def _convolution(graph: _Graph, layer: layers.Conv2D) -> None:
    if layer.groups != 1 or layer.dilation_rate != (1, 1):
        raise _no_form(layer, "grouped or dilated convolutions")
    graph.turn(True, layer.name)
    constants = {"kernel": _value(layer.kernel).transpose(3, 2, 0, 1)}
    if layer.use_bias:
        constants["bias"] = _value(layer.bias)
    graph.add(
        "Conv", layer.name, constants,
        kernel_shape=layer.kernel_size, strides=layer.strides, pads=_pads(layer, layer.kernel_size),
    )  # fmt: skip
    _activation(graph, layer)


def _normalisation(graph: _Graph, layer: layers.BatchNormalization) -> None:
    mean, variance = _value(layer.moving_mean), _value(layer.moving_variance)
    if len(layer.output.shape) == 4:  # of (batch, features) there is but one order
        graph.turn(True, layer.name)
    scale = _value(layer.gamma) if layer.scale else np.ones_like(mean)
    shift = _value(layer.beta) if layer.center else np.zeros_like(mean)
    constants = {"scale": scale, "shift": shift, "mean": mean, "variance": variance}
    graph.add("BatchNormalization", layer.name, constants, epsilon=layer.epsilon)


def _pooling(graph: _Graph, layer: layers.MaxPooling2D) -> None:
    graph.turn(True, layer.name)
    pads = _pads(layer, layer.pool_size)
    graph.add("MaxPool", layer.name, kernel_shape=layer.pool_size, strides=layer.strides, pads=pads)


def _flatten(graph: _Graph, layer: layers.Flatten) -> None:
    graph.turn(False, layer.name)
    graph.add("Flatten", layer.name)


def _dense(graph: _Graph, layer: layers.Dense) -> None:
    constants = {"kernel": _value(layer.kernel)}
    if layer.use_bias:
        constants["bias"] = _value(layer.bias)
    graph.add("Gemm", layer.name, constants)
    _activation(graph, layer)


def _nothing(graph: _Graph, layer: layers.Layer) -> None:
    """Dropout does nothing in inference."""


def _activation(graph: _Graph, layer: layers.Layer) -> None:
    name = keras.activations.serialize(layer.activation)
    if name == "relu":
        graph.add("Relu", f"{layer.name}/relu")
    elif name == "softmax" and len(layer.output.shape) == 2:
        graph.add("Softmax", f"{layer.name}/softmax", axis=1)
    elif name != "linear":
        raise _no_form(layer, f"the activation {name}")


def _pads(layer: layers.Layer, window: tuple[int, int]) -> list[int]:
    """TensorFlow's padding in numbers (top, left, bottom, right); the odd pixel goes to the end."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    sides = zip(layer.input.shape[1:3], window, layer.strides, strict=True)
    missing = [max((math.ceil(side / step) - 1) * step + size - side, 0) for side, size, step in sides]
    return [*(pad // 2 for pad in missing), *(pad - pad // 2 for pad in missing)]


def _value(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def _no_form(layer: layers.Layer, what: str) -> ModelInvalid:
    return ModelInvalid(
        f"Layer {layer.name!r} has no ONNX form here: {what} are not known.",
        fix="add them to ml/training/onnx_graph.py.",
    )


_WRITERS: dict[type, Callable[[_Graph, Any], None]] = {
    layers.Rescaling: _rescaling,
    layers.UpSampling2D: _enlargement,
    layers.Conv2D: _convolution,
    layers.BatchNormalization: _normalisation,
    layers.MaxPooling2D: _pooling,
    layers.Dropout: _nothing,
    layers.Flatten: _flatten,
    layers.Dense: _dense,
}
