"""The engine against tiny models, and against files that are no models."""

import threading
import weakref

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ml.errors import InputInvalid, ModelInvalid
from ml.serving import engine
from ml.serving.engine import CHUNK, Engine, ServingEngine, graph_signature
from tests.tiny_models import PIXELS, always, make_onnx

IMAGES = np.random.default_rng(3).integers(0, 256, (CHUNK + 3, 32, 32, 3), dtype=np.uint8)


def softmax_regression(images, weights):
    logits = images.reshape(len(images), -1).astype(np.float64) / 255 @ weights
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_probabilities_are_those_of_the_formula_across_chunks(tmp_path):
    weights = np.random.default_rng(0).normal(0, 0.05, (PIXELS, 10))
    got = Engine(make_onnx(tmp_path / "m.onnx", weights=weights)).predict(IMAGES)
    assert got.dtype == np.float32
    assert got.shape == (len(IMAGES), 10)
    np.testing.assert_allclose(got, softmax_regression(IMAGES, weights), atol=1e-5)


def test_uint8_and_float32_give_the_same(tmp_path):
    engine = Engine(make_onnx(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(engine.predict(IMAGES[:5]), engine.predict(IMAGES[:5].astype(np.float32)))


def test_a_graph_says_what_it_takes_and_gives(tmp_path):
    image, answer = ("float32", (-1, 32, 32, 3)), ("float32", (-1, 10))
    assert graph_signature(make_onnx(tmp_path / "m.onnx")) == (image, answer)
    assert graph_signature(make_onnx(tmp_path / "n.onnx", classes=9)) == (image, ("float32", (-1, 9)))
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:-100])
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        graph_signature(tmp_path / "cut.onnx")


def test_no_images_give_no_rows(tmp_path):
    assert Engine(make_onnx(tmp_path / "m.onnx")).predict(IMAGES[:0]).shape == (0, 10)


def test_a_view_with_strides_is_read_in_its_own_order(tmp_path):
    engine = Engine(make_onnx(tmp_path / "m.onnx"))
    mirrored = IMAGES[:4, :, ::-1]
    np.testing.assert_array_equal(engine.predict(mirrored), engine.predict(mirrored.copy()))


@pytest.mark.parametrize(
    "images",
    [np.zeros((32, 32, 3), np.uint8), np.zeros((1, 28, 28, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float64)],
    ids=["no batch", "wrong side", "wrong dtype"],
)
def test_a_wrong_array_is_refused_with_what_is_expected(tmp_path, images):
    engine = Engine(make_onnx(tmp_path / "m.onnx"))
    with pytest.raises(InputInvalid, match=r"\(n, 32, 32, 3\)"):
        engine.predict(images)


def test_threads_share_one_engine(tmp_path):
    engine = Engine(make_onnx(tmp_path / "m.onnx"), threads=1)
    expected = engine.predict(IMAGES)
    wrong: list[int] = []

    def work(row):
        for _ in range(50):
            if not np.allclose(engine.predict(IMAGES[row : row + 1]), expected[row : row + 1], atol=1e-6):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def graph_with(*, input_type=TensorProto.FLOAT, shape=("N", 32, 32, 3), final="Softmax"):
    """The tiny model with one thing changed."""
    flat = int(np.prod(shape[1:]))
    weights = np.random.default_rng(0).normal(0, 0.001, (flat, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["real", "flat"], ["pixels"]),
            helper.make_node("Gemm", ["pixels", "weights", "bias"], ["logits"]),
            helper.make_node(final, ["logits"], ["out"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", input_type, list(shape))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [shape[0], 10])],
        [
            numpy_helper.from_array(np.array([-1, flat]), "flat"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.ones(10, np.float32), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_model_that_takes_uint8_works_too(tmp_path):
    onnx.save(graph_with(input_type=TensorProto.UINT8), tmp_path / "m.onnx")
    onnx.save(graph_with(), tmp_path / "f.onnx")
    got = Engine(tmp_path / "m.onnx").predict(IMAGES[:4])
    np.testing.assert_allclose(got, Engine(tmp_path / "f.onnx").predict(IMAGES[:4]), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": ("N", 3, 32, 32)}, r"not \(any batch, 32, 32, 3\)"),
        ({"shape": ("N", 3072)}, r"not \(any batch, 32, 32, 3\)"),
        ({"shape": (1, 32, 32, 3)}, r"takes \[1, 32, 32, 3\]"),
        ({"input_type": TensorProto.DOUBLE}, r"tensor\(double\)"),
        ({"final": "Identity"}, "no probabilities"),
    ],
    ids=["channels first", "flat", "fixed batch", "double", "logits"],
)
def test_a_model_of_another_shape_is_refused(tmp_path, changes, said):
    onnx.save(graph_with(**changes), tmp_path / "m.onnx")
    with pytest.raises(ModelInvalid, match=said):
        Engine(tmp_path / "m.onnx")


def test_a_model_of_eleven_classes_is_refused(tmp_path):
    with pytest.raises(ModelInvalid, match="11"):
        Engine(make_onnx(tmp_path / "m.onnx", classes=11))


def test_a_model_that_answers_nan_is_refused(tmp_path):
    with pytest.raises(ModelInvalid, match="NaN"):
        Engine(make_onnx(tmp_path / "m.onnx", bias=np.full(10, np.nan)))


def test_a_truncated_file_is_refused(tmp_path):
    whole = make_onnx(tmp_path / "m.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        Engine(tmp_path / "half.onnx")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelInvalid, match=r"none\.onnx"):
        Engine(tmp_path / "none.onnx")


def test_a_constant_model_says_its_class(tmp_path):
    got = Engine(make_onnx(tmp_path / "m.onnx", **always(4, confidence=0.9))).predict(IMAGES[:1])
    assert got.argmax() == 4
    assert got[0, 4] == pytest.approx(0.9, abs=1e-4)


def test_an_engine_that_nobody_holds_gives_its_memory_back_once_its_sessions_are_gone(tmp_path, monkeypatch):
    served = ServingEngine(make_onnx(tmp_path / "m.onnx", **always(4)))
    sessions = [weakref.ref(served._together), weakref.ref(served._apart)]
    left = []
    monkeypatch.setattr(engine, "_give_back_memory", lambda: left.append([session() for session in sessions]))
    del served
    assert left == [[None, None]]
