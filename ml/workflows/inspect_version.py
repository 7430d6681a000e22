"""Inspection: whether a version, as the registry hands it out, is a model that the server can use.

Nothing but the registry's files and the dataset's test images goes in; how good the model is, is not asked. Owns the
mechanical checks and the process that they run in: a model that brings its process down must not take the gate with it.
The bounds are the gate's policy (`ml.evaluation.gate_policy`), what follows from a failure is the gate's.
"""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ml import errors
from ml.addresses import public_text
from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.datasets.store import load_split
from ml.errors import CifarError, ModelInvalid, ModelNotFound
from ml.evaluation.engine_choice import EngineName
from ml.evaluation.gate import Check
from ml.evaluation.gate_policy import GatePolicy, load_policy
from ml.evaluation.golden import read_golden
from ml.registry.signature import read_signature
from ml.registry.versions import (
    FP32,
    GOLDEN_FILE,
    INT8,
    KERAS_FILE,
    MODEL_FILES,
    Form,
    ModelVersion,
    Registry,
    checksum_tag,
    form_of,
)
from ml.serving.decoding import EncodedImage, decode_images
from ml.serving.engine import Engine, graph_signature
from ml.settings import PROJECT_ROOT, Settings
from ml.workflows.training_choice import use_backend

logger = logging.getLogger(__name__)

FETCHES, SIGNATURE, ENGINE, AGREEMENT = "fetches", "signature", "server's engine", "agreement"
GOLDEN, LATENCY, SIZE = "golden images", "p95 latency", "size"
NAMES = (FETCHES, SIGNATURE, ENGINE, AGREEMENT, GOLDEN, LATENCY, SIZE)
"""Of the checks, in the order of the answer; every inspection has all of them."""
FRESH_PROCESS = "fresh process"
"""Of the one check that stands for all where the process gave no answer."""

_SIGNATURE = (("float32", (-1, *IMAGE_SHAPE)), ("float32", (-1, NUM_CLASSES)))
_TIMED, _WARM_UP = 200, 20
_PATIENCE_S = 600.0
_COMMAND = (sys.executable, "-m", "ml.cli", "inspect")
_LAST_LINES = 5

_ABOUT_THE_MODEL = (ModelInvalid, ModelNotFound)
"""Errors that say that the version cannot be used. Any other of `ml.errors` says nothing of it: nobody looked."""


def inspect_version(settings: Settings, version: int, engine: EngineName | None = None) -> dict[str, object]:
    """Carries out every mechanical check on one version, in this process.

    The files come from the registry into an empty folder, which goes afterwards. Imports Keras.

    Args:
        settings: where registry and datasets are, the gate's policy, what Keras computes with, and the server's cores.
        version: its number.
        engine: `fp32` or `int8`, which of its forms; None: the one in which it serves.

    Returns:
        {"version", "engine", "checks": [{"name", "holds", "says", "figure", "bound", "unit"}, ...], one for each of
        `NAMES`, "seconds"}. Figure and bound are None where a check has none. A check for which an earlier one must
        hold is "not reached" where it does not.

    Raises:
        ModelNotFound: there is no such version.
        ConfigurationError: the policy cannot be used, or Keras' backend.
        DatasetNotFound, DatasetInvalid, StorageError: the test images cannot be read, or the disk refuses.
        RegistryUnavailable: MLflow could not be asked.
    """
    began = time.monotonic()
    policy = load_policy(settings.gate_policy)
    registry = Registry(settings.tracking_uri)
    found = registry.by_version(version)
    form = form_of(engine) if engine else found.form
    few = policy.mechanical.agreement_images
    images = load_split(settings.data_url, found.dataset_id, "test", limit=few).images
    use_backend(settings.keras_backend)
    with tempfile.TemporaryDirectory(prefix="inspect-") as folder:
        inspection = _Inspection(
            registry,
            found,
            form,
            policy=policy,
            images=images,
            folder=Path(folder),
            cores=settings.prediction_cores,
        )
        checks = inspection.checks()
    for check in checks:
        logger.info("%s %s: %s", "holds" if check.holds else "FAILS", check.name, check.says)
    return {
        "version": version,
        "engine": form.engine,
        "checks": [_as_dict(check) for check in checks],
        "seconds": round(time.monotonic() - began, 1),
    }


def inspect_in_fresh_process(
    settings: Settings, version: int, engine: EngineName | None = None, *, timeout_seconds: float = _PATIENCE_S
) -> tuple[Check, ...]:
    """`inspect_version` by `cifar10 inspect` in a process of its own, on the processor alone, as the server runs.

    Returns:
        One check for each of `NAMES`. Or one alone, `FRESH_PROCESS`, which fails: there is no such version, or the
        process was killed, answered nothing that can be read, fell over something unforeseen, or ran out of time.

    Raises:
        CifarError: what `inspect_version` raises, except for ModelNotFound: the version was not inspected.
    """
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        try:
            done = subprocess.run(
                [*_COMMAND, str(version), *(("--engine", engine) if engine else ()), "--json"],
                env=_environment(settings, folder),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            spoken = error.stderr or b""
            text = spoken.decode(errors="replace") if isinstance(spoken, bytes) else spoken
            return (_failed(f"gave no answer within {timeout_seconds:g} s", text),)
    if done.returncode < 0:
        return (_failed(f"was killed by {_signal_name(-done.returncode)}", done.stderr),)
    return _understood(done.stdout, done.returncode, done.stderr)


class _Inspection:
    """One version, and what has been found of it so far. Every method that finds something raises ModelInvalid."""

    def __init__(
        self,
        registry: Registry,
        version: ModelVersion,
        form: Form,
        *,
        policy: GatePolicy,
        images: np.ndarray,
        folder: Path,
        cores: int,
    ) -> None:
        self._registry = registry
        self._version = version
        self._form = form
        self._policy = policy.mechanical
        self._int8 = policy.int8
        self._images = images
        self._folder = folder
        self._cores = cores
        self._files: dict[str, Path] = {}
        self._engine: Engine | None = None
        self._answers_of_engine = np.empty((0, NUM_CLASSES), np.float32)

    def checks(self) -> tuple[Check, ...]:
        """One for each of `NAMES`."""
        policy = self._policy
        found = {
            FETCHES: _checked(FETCHES, self._fetches),
            SIGNATURE: _checked(SIGNATURE, self._signature),
            ENGINE: _checked(ENGINE, self._answers),
            GOLDEN: _checked(GOLDEN, self._golden, float(NUM_CLASSES), "classes"),
            LATENCY: _checked(LATENCY, self._latency, policy.p95_latency_ms, "ms"),
            SIZE: _checked(SIZE, self._size, policy.size_mib, "MiB"),
            # Last: Keras and its threads stay in the process, and would be in the latency.
            AGREEMENT: _checked(AGREEMENT, self._agreement, policy.agreement),
        }
        return tuple(found[name] for name in NAMES)

    def _fetches(self) -> "_Found":
        wanted = [file for file in MODEL_FILES if file != GOLDEN_FILE or self._has_golden]
        wanted += [file for file in self._form.files if file not in MODEL_FILES]
        wrong = []
        for file in wanted:
            try:
                folder = self._registry.fetch(self._version, self._folder, (file,))
            except ModelInvalid as error:
                wrong.append(error.message)
            else:
                self._files[file] = folder / "artifacts" / file
        if wrong:
            return _Found(holds=False, says=" ".join(wrong))
        return _Found(holds=True, says=f"{len(wanted)} files, each with the SHA-256 of its registration")

    def _signature(self) -> "_Found":
        declared = read_signature(self._registry.fetch_declaration(self._version, self._folder))
        graph = graph_signature(self._file(self._form.onnx))
        wrong = [
            f"{what} says {_in_words(given)}"
            for what, given in (("MLmodel", declared), (self._form.onnx, graph))
            if given != _SIGNATURE
        ]
        if wrong:
            return _Found(holds=False, says=f"{'; '.join(wrong)}; {_in_words(_SIGNATURE)} wanted")
        return _Found(holds=True, says=f"{_in_words(_SIGNATURE)}, by MLmodel and by the graph")

    def _answers(self) -> "_Found":
        engine = Engine(self._file(self._form.onnx), threads=self._cores)
        rows = engine.predict(self._images)
        if rows.min() < -1e-6 or not np.allclose(rows.sum(axis=1), 1, atol=1e-3):
            return _Found(holds=False, says=f"answers {len(rows)} test images with rows that are no probabilities")
        self._engine, self._answers_of_engine = engine, rows
        return _Found(holds=True, says=f"answers {len(rows)} test images with probabilities")

    def _agreement(self) -> "_Found":
        keras_file = self._file(KERAS_FILE)
        self._ready_engine()
        # Only now: it imports Keras, and that takes ten seconds.
        from ml.training.export import answers_of_keras  # noqa: PLC0415

        by_onnx, holds, more = self._answers_of_engine, True, ""
        if self._form is INT8:
            # Keras knows no int8: it is held to float32's ONNX file, and that one's answers to int8's.
            by_onnx = Engine(self._file(FP32.onnx), threads=self._cores).predict(self._images)
            same = float((by_onnx.argmax(axis=1) == self._answers_of_engine.argmax(axis=1)).mean())
            holds = same >= self._int8.agreement
            more = f"; int8 takes {same:.4f} of them for the same class, at least {self._int8.agreement:g} wanted"
        by_keras = answers_of_keras(keras_file, self._images.astype(np.float32))
        apart = float(np.abs(by_keras - by_onnx).max())
        says = f"Keras and ONNX differ by at most {apart:.2g} on {len(self._images)} test images"
        return _Found(
            holds=holds and apart <= self._policy.agreement,  # NaN is not
            says=f"{says}, at most {self._policy.agreement:g} wanted{more}",
            figure=apart,
        )

    def _golden(self) -> "_Found":
        if not self._has_golden:
            return _Found(holds=False, says=f"the version has no {GOLDEN_FILE}: register it anew with `cifar10 train`")
        golden = read_golden(self._file(self._form.golden))
        bound = self._int8.golden_agreement if self._form is INT8 else self._policy.agreement
        engine = self._ready_engine()
        if len(golden.labels) == 0:
            return _Found(holds=False, says="there is not one golden image", figure=0.0)
        given = engine.predict(golden.images)
        right = int((given.argmax(axis=1) == golden.labels).sum())
        apart = float(np.abs(given - golden.probabilities).max())
        says = f"{right} of {NUM_CLASSES} classes right, probabilities differ by at most {apart:.2g} from those kept"
        if golden.missing:
            says += f"; none kept of {', '.join(golden.missing)}"
        return _Found(
            holds=right == NUM_CLASSES and apart <= bound,
            says=f"{says}; all {NUM_CLASSES} and at most {bound:g} wanted",
            figure=float(right),
        )

    def _latency(self) -> "_Found":
        engine = self._ready_engine()
        encoded = [_png(image) for image in self._images[:_TIMED]]
        times = []
        for turn in range(-_WARM_UP, _TIMED):
            image = EncodedImage(encoded[turn % len(encoded)], "image/png")
            began = time.perf_counter()
            engine.predict(decode_images([image]))
            if turn >= 0:
                times.append(time.perf_counter() - began)
        slow = float(np.percentile(times, 95)) * 1000
        return _Found(
            holds=slow <= self._policy.p95_latency_ms,
            says=f"{slow:.2f} ms at the 95th percentile of {_TIMED} images, one at a time with {self._cores} "
            f"threads, at most {self._policy.p95_latency_ms:g} ms wanted",
            figure=slow,
        )

    def _size(self) -> "_Found":
        size = self._file(self._form.onnx).stat().st_size / 2**20
        return _Found(
            holds=size <= self._policy.size_mib,
            says=f"{self._form.onnx} has {size:.2f} MiB, at most {self._policy.size_mib:g} wanted",
            figure=size,
        )

    @property
    def _has_golden(self) -> bool:
        """False of versions that were registered before there were golden images."""
        return checksum_tag(GOLDEN_FILE) in self._version.tags

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise _NotReachedError(f"not reached: {name} could not be fetched")
        return self._files[name]

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            raise _NotReachedError(f"not reached: the {ENGINE} does not answer")
        return self._engine


@dataclass(frozen=True, slots=True)
class _Found:
    """What a check found: whether it holds, in words, and as a figure where it has one."""

    holds: bool
    says: str
    figure: float | None = None


class _NotReachedError(Exception):
    """An earlier check would have had to hold."""


def _checked(name: str, find: Callable[[], _Found], bound: float | None = None, unit: str = "") -> Check:
    try:
        found = find()
    except _NotReachedError as error:
        found = _Found(holds=False, says=str(error))
    except _ABOUT_THE_MODEL as error:
        found = _Found(holds=False, says=error.message)
    figure = found.figure
    if figure is not None and not math.isfinite(figure):
        figure = None  # JSON knows no NaN; the words do
    return Check(name, "mechanical", found.holds, found.says, figure, bound=bound, unit=unit)


def _in_words(signature: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return " -> ".join(f"{dtype} {shape}" for dtype, shape in signature)


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _as_dict(check: Check) -> dict[str, object]:
    return {key: getattr(check, key) for key in ("name", "holds", "says", "figure", "bound", "unit")}


def _environment(settings: Settings, folder: str) -> dict[str, str]:
    """What the process is told: this one's environment, and in its place what was chosen here."""
    return dict(os.environ) | {
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "MLOPS_DATA_URL": settings.data_url,
        "GATE_POLICY": str(settings.gate_policy),
        "KERAS_BACKEND": settings.keras_backend,
        "PREDICTION_CORES": str(settings.prediction_cores),
        # Nothing cached reaches it, and what it leaves when it is killed goes with the folder.
        "MLOPS_VAR_DIR": folder,
        "TMPDIR": folder,
        "PYTHONPATH": str(PROJECT_ROOT),
        # The server has no accelerator, and here one may be in use by a training; it may also round otherwise.
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
    }


def _understood(stdout: str, code: int, stderr: str) -> tuple[Check, ...]:
    """The checks in the answer, or the error in it."""
    try:
        answer = json.loads(stdout)
        if "error" in answer:
            return (_refused(_error_of(answer["error"]), stderr),)
        checks = tuple(Check(group="mechanical", **item) for item in answer["checks"])
    except (ValueError, TypeError, KeyError):
        return (_failed(f"ended with code {code} and gave no answer that can be read", stderr),)
    # An answer that leaves checks out would pass where nothing was looked at.
    if code != 0 or tuple(check.name for check in checks) != NAMES:
        return (_failed(f"ended with code {code} and answered with other checks than were asked for", stderr),)
    return checks


def _error_of(said: Mapping[str, str]) -> CifarError:
    kind = getattr(errors, said["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, CifarError)):
        kind = CifarError
    return kind(said["message"], fix=said["fix"])


def _refused(error: CifarError, stderr: str) -> Check:
    """A failed check where the error is the version's fault; raises it where it says nothing of the version."""
    if isinstance(error, _ABOUT_THE_MODEL):
        return Check(FRESH_PROCESS, "mechanical", holds=False, says=error.message)
    if type(error) is CifarError:  # what the command calls an exception that nobody foresaw: it fell over this version
        return _failed(f"fell over something unforeseen ({error.message})", stderr)
    raise error


def _failed(what: str, stderr: str) -> Check:
    last = " | ".join(line.strip() for line in stderr.strip().splitlines()[-_LAST_LINES:])
    heard = f"; its last words: {public_text(last)[-1000:]}" if last else "; it said nothing"
    return Check(FRESH_PROCESS, "mechanical", holds=False, says=f"the process {what}{heard}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
