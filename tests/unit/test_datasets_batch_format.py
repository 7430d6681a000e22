"""The pickle sandbox: reads real batches, and runs nothing that a file asks for."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.datasets.batch_format import parse_batch, parse_label_names
from ml.datasets.synthetic import generate
from ml.errors import SourceCorrupt
from tests.cifar10_archive import batch

RAW = generate(10, 10)
VALID = batch(RAW.train_images, RAW.train_labels.tolist())


def python2_batch(planes: np.ndarray, labels: list[int]) -> bytes:
    """As Python 2 and numpy 1 wrote the official files: str as bytes, the array through numpy.core."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    data = planes.tobytes()
    rows, columns = (b"K" + bytes([len(planes)])), (b"M" + (3072).to_bytes(2, "little"))
    return b"".join(
        [
            b"\x80\x02}(",
            text(b"labels"), b"](", *(b"K" + bytes([label]) for label in labels), b"e",
            text(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85", text(b"b"), b"\x87R",
            b"(K\x01", rows, columns, b"\x86",
            b"cnumpy\ndtype\n", text(b"u1"), b"K\x00K\x01\x87R",
            b"(K\x03", text(b"|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T", len(data).to_bytes(4, "little"), data, b"tb",
            b"u.",
        ]
    )  # fmt: skip


def test_images_come_out_row_by_row_with_their_labels() -> None:
    images, labels = parse_batch(VALID, "data_batch_1")
    np.testing.assert_array_equal(images, RAW.train_images)
    np.testing.assert_array_equal(labels, RAW.train_labels)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


def test_the_official_python_2_form_is_read() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    content = python2_batch(planes, [3, 9])
    trusted = pickle.loads(content, encoding="bytes")  # what numpy itself makes of these bytes
    np.testing.assert_array_equal(trusted[b"data"], planes)
    images, labels = parse_batch(content, "data_batch_1")
    assert labels.tolist() == [3, 9]
    # Pixel (row 5, column 7) of the green plane.
    assert images[1, 5, 7, 1] == planes[1, 1024 + 5 * 32 + 7]


class Payload:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@pytest.mark.parametrize("function", ["os.system", "eval", "np.load"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(function: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    payload = {
        "os.system": Payload(os.system, f"touch {trace}"),
        "eval": Payload(eval, f"open({str(trace)!r}, 'w')"),
        "np.load": Payload(np.load, str(trace)),
    }[function]
    content = pickle.dumps({b"data": payload, b"labels": []}, protocol=2)
    with pytest.raises(SourceCorrupt, match="asks to run"):
        parse_batch(content, "data_batch_1")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(os.system, f"touch {trace}")))
    assert trace.exists(), "the payload is harmless, so this test proves nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CIFAR-10 batch"),
        (b"<html>not found</html>", "not a CIFAR-10 batch"),
        (VALID[:1000], "not a CIFAR-10 batch"),
        (pickle.dumps([1, 2], protocol=2), "holds a list"),
        (pickle.dumps({b"labels": [1]}, protocol=2), "not a plain array"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, protocol=2), "dtype"),
        (pickle.dumps({b"data": np.array([[None]]), b"labels": [1]}, protocol=2), "not a plain array"),
        (pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [1, 2]}, protocol=2), "shape"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2), "1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}, protocol=2), "integers"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**70]}, protocol=2), "64 bits"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": "1"}, protocol=2), "integers"),
    ],
)
def test_what_is_no_batch_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(SourceCorrupt, match=message) as refusal:
        parse_batch(content, "data_batch_1")
    assert "data_batch_1" in str(refusal.value)
    assert "Fix:" in str(refusal.value)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    with pytest.raises(SourceCorrupt):
        parse_batch(content, "data_batch_1")


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_no_altered_header_raises_anything_else(position: int, replacement: bytes) -> None:
    altered = VALID[:position] + replacement + VALID[position + len(replacement) :]
    try:
        images, _ = parse_batch(altered, "data_batch_1")
    except SourceCorrupt:
        return
    assert images.shape == RAW.train_images.shape


def test_label_names_are_read() -> None:
    assert parse_label_names(pickle.dumps({b"label_names": [b"a", b"b"]}, protocol=2), "batches.meta") == ("a", "b")
    with pytest.raises(SourceCorrupt, match="no list of label names"):
        parse_label_names(pickle.dumps({b"label_names": 3}, protocol=2), "batches.meta")
