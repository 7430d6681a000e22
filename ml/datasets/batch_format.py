"""Reads CIFAR-10's "python version" batch files (https://www.cs.toronto.edu/~kriz/cifar.html) without trusting them.

The files are pickles, and a pickle is a program. This reader owns the sandbox: the only callables a file may name are
the four below, and none of them is numpy's own: they record what the file says, and the arrays are then built
from the recorded bytes after their dtype and shape were checked. What the values must be is `checks`' business.
"""

import io
import math
import pickle
import struct
from typing import NoReturn

import numpy as np

from ml.datasets.labels import IMAGE_BYTES, IMAGE_SIDE
from ml.errors import SourceCorrupt

_FIX = "fetch the archive again from https://www.cs.toronto.edu/~kriz/cifar.html and set CIFAR10_SOURCE to it."
_MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What `pickle` raises on bytes that are no pickle, or not one that these stand-ins can follow."""


class _RecordedType:
    """Stands in for `numpy.ndarray` as the file names it; never called."""


class _RecordedDtype:
    """Stands in for `numpy.dtype`: keeps the code ("u1") and drops the state that follows it."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment mean nothing for one-byte values."""


class _RecordedArray:
    """Stands in for an array: keeps shape, dtype and bytes for `_to_uint8`."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _encode(text: object, codec: object = "latin1") -> bytes:
    """How Python 3 spells bytes in pickle protocol 2."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unexpected encoding")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _RecordedArray,
    ("numpy._core.multiarray", "_reconstruct"): _RecordedArray,
    ("numpy", "ndarray"): _RecordedType,
    ("numpy", "dtype"): _RecordedDtype,
    ("_codecs", "encode"): _encode,
}


class _BatchUnpickler(pickle.Unpickler):
    """Resolves the names in `_ALLOWED` to stand-ins, and no other name at all."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks to run {module_name}.{global_name}") from None


def parse_batch(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one batch file.

    Args:
        content: the file's bytes, already verified against its checksum.
        name: how to call the file in an error.

    Returns:
        Images uint8 (n, 32, 32, 3), RGB, and labels int64 (n,), as the file has them.

    Raises:
        SourceCorrupt: not a pickle, not of the batch layout, or one that tries to run something (nothing is run).
    """
    batch = _load(content, name)
    planes = _to_uint8(batch.get(b"data"), name)
    labels = batch.get(b"labels")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        _refuse(name, "its labels are not a list of integers")
    try:
        label_array = np.array(labels, dtype=np.int64)
    except OverflowError:
        _refuse(name, "a label does not fit 64 bits")
    if planes.ndim != 2 or planes.shape[1] != IMAGE_BYTES or len(planes) != len(label_array):
        _refuse(name, f"data has shape {planes.shape} for {len(label_array)} labels; expected (n, {IMAGE_BYTES})")
    # The file keeps a red, a green and a blue plane per image; everything after this module is row, column, channel.
    images = planes.reshape(-1, 3, IMAGE_SIDE, IMAGE_SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), label_array


def parse_label_names(content: bytes, name: str) -> tuple[str, ...]:
    """Reads `batches.meta`: the class names in the order of their ids.

    Raises:
        SourceCorrupt: as for `parse_batch`.
    """
    names = _load(content, name).get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(each, bytes) for each in names):
        _refuse(name, "it holds no list of label names")
    return tuple(each.decode("ascii", errors="replace") for each in names)


def _load(content: bytes, name: str) -> dict[object, object]:
    try:
        # encoding="bytes": the originals were written by Python 2, whose str are bytes.
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _MALFORMED as error:
        raise SourceCorrupt(f"{name} is not a CIFAR-10 batch: {error}.", fix=_FIX) from error
    if not isinstance(batch, dict):
        _refuse(name, f"it holds a {type(batch).__name__}, not a dictionary")
    # Python 3 writes text keys where Python 2 wrote bytes.
    return {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}


def _to_uint8(recorded: object, name: str) -> np.ndarray:
    state = recorded.state if isinstance(recorded, _RecordedArray) else None
    match state:
        case (_, tuple(shape), _RecordedDtype(code=code), False, bytes(content)):
            pass
        case _:
            _refuse(name, "its data is not a plain array")
    if code not in ("u1", b"u1"):
        _refuse(name, f"its data is of dtype {code!r}; expected 'u1' (uint8)")
    if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) != len(content):
        _refuse(name, f"its data has {len(content)} bytes for the shape {shape}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _refuse(name: str, why: str) -> NoReturn:
    raise SourceCorrupt(f"{name} is not a CIFAR-10 batch: {why}.", fix=_FIX)
