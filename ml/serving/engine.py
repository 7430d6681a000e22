"""Inference on one ONNX file through ONNX Runtime.

Owns the sessions, how many cores they use, and the promise that what comes out are probabilities. Knows neither where
the file came from (`ml.serving.hot_swap`), nor how images are decoded (`ml.serving.decoding`), nor who predicts beside
whom (`ml.serving.batcher`).
"""

import ctypes
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import InputInvalid, ModelInvalid

logger = logging.getLogger(__name__)

CHUNK = 128
"""Images handed to the session at once: bounds VGG16's activations to some 200 MB; more is not faster on a CPU."""

_INPUT_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}

# ONNX Runtime's exceptions have no common base but Exception: these are all that it can raise.
_ORT_ERRORS = tuple(
    kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
)


Form = tuple[str, tuple[int, ...]]
"""Of a tensor: numpy's name of its dtype (ONNX's where it has none), and its shape, -1 where any size will do."""


class Predictor(Protocol):
    """What answers requests: `ServingEngine`. Safe to use from several threads at once."""

    def predict(self, images: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """uint8 (n, 32, 32, 3) -> float32 (n, 10); `alone`: nothing else is predicted meanwhile."""


class Engine:
    """A model that is ready to predict. Safe to use from several threads at once.

    Args:
        onnx_path: the model: one input (batch, 32, 32, 3), float32 or uint8, raw 0-255 RGB; one output (batch, 10).
        threads: cores that one `predict` may use; 0 leaves the choice to ONNX Runtime (all physical ones).
        warm: batch sizes to predict once, at least two, so that no caller waits for a first time. The second also
            shows that the batch dimension is free.

    Raises:
        ModelInvalid: when the file is not such a model, or its answer to a blank image is not a probability vector.
    """

    def __init__(self, onnx_path: Path, threads: int = 0, *, warm: Sequence[int] = (1, 2)) -> None:
        self._path = onnx_path
        self._session = _session(onnx_path, threads)
        self._input, self._output, self._dtype = _check_signature(self._session, onnx_path)
        self._warm_up(warm)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities of images.

        Args:
            images: uint8 or float32 (n, 32, 32, 3), raw RGB in 0-255; n may be 0.

        Returns:
            float32 (n, 10); each row sums to 1.

        Raises:
            InputInvalid: when shape or dtype is another.
            ModelInvalid: when the model fails on these images, or answers NaN.
        """
        if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE or images.dtype not in (np.uint8, np.float32):
            raise InputInvalid(
                f"An engine takes uint8 or float32 images of shape (n, 32, 32, 3), not {images.dtype} {images.shape}.",
                fix="resize to 32x32 RGB first (ml.serving.decoding does).",
            )
        if len(images) == 0:
            return np.empty((0, NUM_CLASSES), np.float32)
        chunks = [self._run(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def _run(self, images: np.ndarray) -> np.ndarray:
        batch: np.ndarray = np.ascontiguousarray(images, dtype=self._dtype)
        try:
            probabilities = self._session.run([self._output], {self._input: batch})[0]
        except _ORT_ERRORS as error:
            raise _invalid(self._path, f"fails on a batch of {len(batch)} ({_reason(error, self._path)})") from error
        if probabilities.shape != (len(batch), NUM_CLASSES):
            raise _invalid(self._path, f"answers {probabilities.shape} to {len(batch)} images, not (n, {NUM_CLASSES})")
        if not np.isfinite(probabilities).all():
            raise _invalid(self._path, "answers NaN or infinity")
        return probabilities.astype(np.float32, copy=False)

    def _warm_up(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            rows = self._run(np.zeros((size, *IMAGE_SHAPE), self._dtype))
            if rows.min() < -1e-6 or not np.allclose(rows.sum(axis=1), 1, atol=1e-3):
                raise _invalid(self._path, f"answers a blank image with {rows[0].tolist()}, which are no probabilities")


class ServingEngine:
    """A model in two sessions: one that uses all cores for a batch, and one that uses a core for each.

    A request that is alone is answered soonest by all cores together. Where several batches run beside each other, a
    core for each does more in the same time: no core waits for another at the end of each layer, and one that other
    work has interrupted holds up nobody else. Safe to use from several threads at once.

    Args:
        onnx_path: as `Engine`.
        cores: that it may use in all; with one there is one session.

    Raises:
        ModelInvalid: as `Engine`.
    """

    _WARM = (1, 2, 4, 8, 16, 32)

    def __init__(self, onnx_path: Path, cores: int = 2) -> None:
        self._together = Engine(onnx_path, threads=cores, warm=self._WARM)
        self._apart = Engine(onnx_path, threads=1, warm=self._WARM) if cores > 1 else self._together
        _give_back_memory()

    def __del__(self) -> None:
        # A swap leaves the old model to its last batch; without this its memory would stay until the next swap.
        self.__dict__.clear()
        if not sys.is_finalizing():
            _give_back_memory()

    def predict(self, images: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """As `Engine.predict`; `alone` says that nothing else is predicted meanwhile, so that all cores are free."""
        return (self._together if alone else self._apart).predict(images)


def graph_signature(onnx_path: Path) -> tuple[Form, Form]:
    """What the graph itself says that it takes and gives; `Engine` proves it by running it.

    Raises:
        ModelInvalid: it cannot be loaded, or has not one input and one output.
    """
    session = _session(onnx_path, threads=1)
    (given,), (made,) = _sides(session, onnx_path)
    return _form(given), _form(made)


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for each other within a batch spin, which saves a third of a small model's time; those that
    # wait for the next batch would take the cores from everything else of the server.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = False  # a plan of memory for each batch size: of thirty sizes, some 50 MB
    options.log_severity_level = 3  # warnings of graph optimisation mean nothing to an operator
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise _invalid(path, f"cannot be loaded ({_reason(error, path)})") from error


def _give_back_memory() -> None:
    """Loading leaves twice the model's size in free lists of the C library, with VGG16 in two sessions 150 MB; dropping
    it leaves all of it there, 180 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _sides(session: ort.InferenceSession, path: Path) -> tuple[list[ort.NodeArg], list[ort.NodeArg]]:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise _invalid(path, f"has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")
    return inputs, outputs


def _form(tensor: ort.NodeArg) -> Form:
    name = np.dtype(_INPUT_TYPES[tensor.type]).name if tensor.type in _INPUT_TYPES else str(tensor.type)
    return name, tuple(size if isinstance(size, int) else -1 for size in tensor.shape)


def _check_signature(session: ort.InferenceSession, path: Path) -> tuple[str, str, type]:
    (given,), (made,) = _sides(session, path)
    if given.type not in _INPUT_TYPES:
        raise _invalid(path, f"takes {given.type}, not float32 or uint8")
    # A free dimension is a name or None; a fixed one must be the right number.
    expected = (None, *IMAGE_SHAPE)
    fits = len(given.shape) == 4 and all(
        not isinstance(d, int) or d == e for d, e in zip(given.shape, expected, strict=True)
    )
    if not fits:
        raise _invalid(path, f"takes {given.shape}, not (any batch, 32, 32, 3)")
    return given.name, made.name, _INPUT_TYPES[given.type]


def _reason(error: Exception, path: Path) -> str:
    # ONNX Runtime names the whole path; this text may reach clients.
    return str(error).strip().splitlines()[0].replace(str(path), path.name)[:300]


def _invalid(path: Path, what: str) -> ModelInvalid:
    return ModelInvalid(
        f"{path.name} {what}.",
        fix="register a version whose ONNX file takes (n, 32, 32, 3) raw RGB and gives (n, 10) softmax probabilities; "
        "`cifar10 rollback` restores the previous champion.",
    )
