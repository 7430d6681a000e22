"""The int8 form of a small network: 8 bits inside, the same in and out, and close answers."""

import numpy as np
import onnx
import pytest

from ml.errors import ModelInvalid, StorageError
from ml.serving.engine import Engine, graph_signature
from ml.training.quantization import quantize
from tests.tiny_models import make_convolutional, make_onnx

RNG = np.random.default_rng(1)
COLOURED = RNG.integers(0, 256, (96, 1, 1, 3)) + RNG.normal(scale=40, size=(96, 32, 32, 3))
IMAGES = np.clip(COLOURED, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    fp32 = make_convolutional(folder / "model.onnx")
    return fp32, quantize(fp32, folder / "model.int8.onnx", IMAGES[:64])


def test_it_takes_and_gives_what_float32_does_and_answers_nearly_so(forms):
    fp32, int8 = forms
    assert graph_signature(int8) == (("float32", (-1, 32, 32, 3)), ("float32", (-1, 10)))
    assert graph_signature(int8) == graph_signature(fp32)
    unseen = IMAGES[64:]
    expected, given = Engine(fp32).predict(unseen), Engine(int8).predict(unseen)
    assert 0 < np.abs(given - expected).max() < 0.1
    assert (given.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    assert np.ptp(expected, axis=0).max() > 0.1, "a model that answers the same to everything proves nothing"


def test_convolutions_and_hidden_layers_are_in_8_bits_and_the_last_layer_is_not(forms):
    graph = onnx.load(forms[1]).graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {item.name: item for item in graph.initializer}

    def weight_of(name):
        (node,) = (node for node in graph.node if node.name == name)
        source = made_by.get(node.input[1])
        return node, None if source is None else weights[source.input[0]], source

    for name, channels in (("conv", 16), ("hidden", 32)):
        node, weight, source = weight_of(name)
        assert made_by[node.input[0]].op_type == "DequantizeLinear"
        assert weight.data_type == onnx.TensorProto.INT8
        assert list(weights[source.input[1]].dims) == [channels], "a scale for each output channel"
    assert weight_of("last")[1] is None
    assert forms[1].stat().st_size < forms[0].stat().st_size / 2


def test_the_order_of_the_images_is_of_no_matter(forms, tmp_path):
    again = quantize(forms[0], tmp_path / "again.onnx", IMAGES[:64][::-1])
    assert again.read_bytes() == forms[1].read_bytes()


def test_what_has_no_int8_form_says_so_and_leaves_nothing(forms, tmp_path):
    target = tmp_path / "model.int8.onnx"
    with pytest.raises(ModelInvalid, match="no layer of it"):
        quantize(make_onnx(tmp_path / "flat.onnx"), target, IMAGES[:8])
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(forms[0].read_bytes()[:-1000])
    with pytest.raises(ModelInvalid, match=r"cut\.onnx has no int8 form"):
        quantize(cut, target, IMAGES[:8])
    with pytest.raises(ModelInvalid, match="one uint8 image"):
        quantize(forms[0], target, IMAGES[:0])
    with pytest.raises(StorageError, match="could not be written"):
        quantize(forms[0], tmp_path / "nowhere" / "model.int8.onnx", IMAGES[:8])
    assert {path.name for path in tmp_path.iterdir()} == {"flat.onnx", "cut.onnx"}
