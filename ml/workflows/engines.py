"""In which form a version is to serve: has both predict the same test images and asks `ml.evaluation.engine_choice`.

Writes nothing but what a person chose by hand; what the gate chose is written by `ml.workflows.promote`.
"""

import logging
import time
from pathlib import Path

import numpy as np

from ml.errors import ConfigurationError, InputInvalid, ModelInvalid, ModelNotFound
from ml.evaluation.engine_choice import EngineChoice, EngineName, Latency, choose_engine, compare_engines
from ml.evaluation.gate_policy import Int8, load_policy
from ml.registry.versions import FP32, INT8, TAG_ENGINE, TAG_ENGINE_REASON, TAG_INT8, ModelVersion, Registry
from ml.serving.engine import Engine
from ml.settings import Settings
from ml.workflows.exam import Exam, answers, fetch_onnx, load_exam

logger = logging.getLogger(__name__)

_TURNS, _WARM_UP = 60, 5


def choose(
    registry: Registry, settings: Settings, policy: Int8, version: ModelVersion, exam: Exam
) -> tuple[EngineChoice, np.ndarray | None]:
    """The form in which a version is to serve, and what that form says of the clean test images where it was asked.

    Whatever is wrong with the int8 form leaves float32, and is told by the reason.

    Raises:
        RegistryUnavailable, StorageError: could not ask; says nothing of the version.
    """
    if not policy.wanted:
        return _float32(version, "the policy wants no int8.")
    if not version.has_int8:
        why = version.tags.get(TAG_INT8)
        return _float32(version, f"the version has no int8 form{f': {why}' if why else '.'}")
    try:
        paths = {form: fetch_onnx(registry, settings, version, form) for form in (FP32, INT8)}
        said = {form: answers(Engine(path), version, form, exam) for form, path in paths.items()}
        latencies = latency_in_turns(paths[FP32], paths[INT8], exam.clean.images, cores=settings.prediction_cores)
        found = compare_engines(exam.clean.labels, said[FP32], said[INT8], latencies, confidence=policy.confidence)
    except (ModelInvalid, ModelNotFound, InputInvalid) as error:
        # Of the float32 form, too: what is wrong with that one its own measurement finds, and refuses it.
        return _float32(version, f"the two forms cannot be compared: {error.message}")
    choice = choose_engine(found, policy)
    logger.info("Version %d serves as %s: %s", version.version, choice.engine, choice.reason)
    return choice, said[INT8 if choice.engine == INT8.engine else FP32]


def set_engine(settings: Settings, version: int, engine: EngineName) -> dict[str, object]:
    """Has a version serve in another form, by a person's wish; the servers swap at one of their next looks.

    float32 is to be had at once, and waits for no promotion. int8 is what the gate would accept, or it is refused: both
    forms are measured on all test images first.

    Returns:
        {"version", "engine", "reason"}, as they are written on the version.

    Raises:
        ModelNotFound: there is no such version.
        ModelInvalid: int8 was asked for and is refused, with the figures; nothing has changed.
        ConfigurationError: there is no such form, or the policy cannot be used.
        DatasetNotFound, DatasetInvalid, StorageError: the test images cannot be read.
        RegistryUnavailable: could not ask; nothing has changed, or the reason alone.
    """
    if engine not in (FP32.engine, INT8.engine):
        raise ConfigurationError(f"{engine!r} is no form of a version.", fix="say fp32 or int8.")
    registry = Registry(settings.tracking_uri)
    found = registry.by_version(version)
    reason = "chosen by hand."
    if engine == INT8.engine:
        exam = load_exam(settings, found.dataset_id, limit=None, per_cell=None)
        choice, _ = choose(registry, settings, load_policy(settings.gate_policy).int8, found, exam)
        if choice.engine != INT8.engine:
            raise ModelInvalid(
                f"Version {version} does not come to serve in int8: {choice.reason}",
                fix="leave it as it is, or change what policies/gate.toml demands under [int8].",
            )
        reason = f"chosen by hand; {choice.reason}"
    registry.set_tags(version, {TAG_ENGINE_REASON: reason, TAG_ENGINE: engine})
    logger.info("Version %d serves as %s: %s", version, engine, reason)
    return {"version": version, "engine": engine, "reason": reason}


def latency_in_turns(fp32: Path, int8: Path, images: np.ndarray, *, cores: int) -> tuple[Latency, Latency]:
    """Of one image at a time on as many cores as the server has: in turns, so that both meet the same load.

    Raises:
        ModelInvalid: one of them cannot be used.
    """
    engines = [Engine(path, threads=cores) for path in (fp32, int8)]
    times: list[list[float]] = [[], []]
    for turn in range(-_WARM_UP, _TURNS):
        image = images[turn % len(images)][None]
        for engine, own in zip(engines, times, strict=True):
            began = time.perf_counter()
            engine.predict(image)
            if turn >= 0:
                own.append((time.perf_counter() - began) * 1000)
    first, second = (Latency(float(np.median(own)), float(np.percentile(own, 95))) for own in times)
    return first, second


def _float32(version: ModelVersion, why: str) -> tuple[EngineChoice, None]:
    logger.info("Version %d serves as fp32: %s", version.version, why)
    return EngineChoice("fp32", why), None
