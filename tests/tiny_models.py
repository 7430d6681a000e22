"""Makes tiny classifiers as ONNX files, for tests that need a model and not TensorFlow.

Each is `softmax(flatten(image / 255) @ weights + bias)`, with the interface of the real exports: input `image`,
float32 (N, 32, 32, 3) in 0-255; output `probabilities`, float32 (N, 10).
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PIXELS = 32 * 32 * 3


def make_onnx(
    path: Path,
    *,
    weights: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    seed: int = 0,
    classes: int = 10,
    padding_bytes: int = 0,
) -> Path:
    """Writes one such model to `path` and returns it.

    `weights` is (3072, classes), drawn from `seed` where none are given; `bias` is (classes,), zero where none is
    given. A bias of NaN makes a model whose probabilities are NaN. `padding_bytes` adds an unused weight of that size,
    to play a large file.
    """
    drawn = np.random.default_rng(seed).normal(0, 0.05, (PIXELS, classes))
    w = np.asarray(drawn if weights is None else weights, dtype=np.float32)
    b = np.asarray(np.zeros(classes) if bias is None else bias, dtype=np.float32)
    constants = {
        "scale": np.array(255, dtype=np.float32),
        "flat": np.array([-1, PIXELS], dtype=np.int64),
        "weights": w,
        "bias": b,
    }
    if padding_bytes:
        constants["padding"] = np.random.default_rng(seed).integers(0, 256, padding_bytes, dtype=np.uint8)
    graph = helper.make_graph(
        [
            helper.make_node("Div", ["image", "scale"], ["unit"]),
            helper.make_node("Reshape", ["unit", "flat"], ["pixels"]),
            helper.make_node("Gemm", ["pixels", "weights", "bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def make_convolutional(path: Path, *, seed: int = 0) -> Path:
    """Writes a small network of the layers that the real exports have, with random weights, and returns `path`.

    Pixels are scaled, then convolution, ReLU, pooling, a hidden dense layer, and one of ten classes.
    """
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (16, 3, 3, 3), "shift": (16,), "hidden": (16 * 64, 32), "bend": (32,), "last": (32, 10)}
    constants = {name: rng.normal(0, 1 / np.sqrt(np.prod(shape[1:]) or 1), shape) for name, shape in shapes.items()}
    constants["hidden"] = rng.normal(0, 0.1, shapes["hidden"])
    constants["scale"] = np.array(1 / 255)
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel", "shift"], ["convolved"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["convolved"], ["bent"]),
        helper.make_node("MaxPool", ["bent"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "hidden", "bend"], ["features"], "hidden"),
        helper.make_node("Relu", ["features"], ["shown"]),
        helper.make_node("Gemm", ["shown", "last"], ["logits"], "last"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny-convolutional",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def always(class_id: int, *, confidence: float = 0.99) -> dict[str, np.ndarray]:
    """Weights and bias (keyword arguments of `make_onnx`) that answer `class_id` to every image."""
    bias = np.full(10, np.log((1 - confidence) / 9))
    bias[class_id] = np.log(confidence)
    return {"weights": np.zeros((PIXELS, 10)), "bias": bias}


def nearest_mean(images: np.ndarray, labels: np.ndarray, *, sharpness: float = 0.05) -> dict[str, np.ndarray]:
    """Weights and bias of the linear classifier 'nearest class mean', learnt in one pass over `images`.

    `images` is uint8 (n, 32, 32, 3), `labels` int (n,). Maximising -|x - m|^2 over classes is maximising
    2 x.m - |m|^2, since |x|^2 is the same for all of them. `sharpness` scales the logits; it moves the
    probabilities and not the class.
    """
    flat = images.reshape(len(images), PIXELS).astype(np.float64) / 255
    means = np.stack([flat[labels == k].mean(axis=0) if (labels == k).any() else np.zeros(PIXELS) for k in range(10)])
    return {"weights": sharpness * 2 * means.T, "bias": -sharpness * (means**2).sum(axis=1)}


def answering(images: np.ndarray, answers: np.ndarray, *, sharpness: float = 8.0) -> dict[str, np.ndarray]:
    """Weights and bias of the linear classifier that takes each of these images for the class that `answers` says.

    `images` is uint8 (n, 32, 32, 3), all different, n well below 3072; `answers` int (n,). The smallest weights that
    fit exactly; what they say of other images means nothing.
    """
    flat = images.reshape(len(images), PIXELS).astype(np.float64) / 255
    # By the normal equations of so few images: the decomposition of all pixels takes ten times as long.
    fitted = flat.T @ np.linalg.solve(flat @ flat.T, np.eye(10)[answers])
    return {"weights": sharpness * fitted, "bias": np.zeros(10)}
