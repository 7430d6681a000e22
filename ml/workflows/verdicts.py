"""What the gate has made of a version, as it is written on it in the registry. Judges nothing and moves nothing."""

import math
from collections.abc import Mapping

from ml.registry.versions import CHAMPION, FP32, PREVIOUS, TAG_ENGINE, TAG_REASON, ModelVersion, Registry
from ml.settings import Settings

TAG_REPORT = "gate.report"
TAG_N, TAG_TEST_ACCURACY = "gate.n", "gate.test_accuracy"
TAG_TEST_PRECISION, TAG_TEST_RECALL, TAG_TEST_LOSS = "gate.test_precision", "gate.test_recall", "gate.test_loss"


def verdict_of(settings: Settings, version: int) -> dict[str, object]:
    """What the gate has made of a version so far, as it is written in the registry. Judges nothing.

    Returns:
        {"version": int, "architecture": str, "dataset_id": str, "decision": "pending" | "promoted" | "refused",
        "reason": str (empty while nobody has looked at it), "validation_accuracy": float | None,
        "test_accuracy", "precision", "recall", "loss": float | None, "n": int (test images it was measured on),
        "engine": "fp32" | "int8" (the form in which it serves, or would),
        "report": address of the gate's report in MLflow's UI | None}.
        A figure that was not, or could not be, measured is None. The decision is empty for a version that was not
        registered by `ml.registry.packaging`: the gate does not look at it.

    Raises:
        ModelNotFound: there is no version of that number.
        RegistryUnavailable: could not ask.
    """
    registry = Registry(settings.tracking_uri)
    return verdict(settings, registry, registry.by_version(version))


def verdict(settings: Settings, registry: Registry, version: ModelVersion) -> dict[str, object]:
    """`verdict_of` a version at hand."""
    published = TAG_REPORT in version.tags
    return {
        "version": version.version,
        "architecture": version.architecture,
        "dataset_id": version.dataset_id,
        "decision": version.decision,
        "reason": version.tags.get(TAG_REASON, ""),
        "validation_accuracy": _finite(version.validation_accuracy),
        "test_accuracy": _finite(version.figure(TAG_TEST_ACCURACY)),
        "precision": _finite(version.figure(TAG_TEST_PRECISION)),
        "recall": _finite(version.figure(TAG_TEST_RECALL)),
        "loss": _finite(version.figure(TAG_TEST_LOSS)),
        "n": int(version.figure(TAG_N) or 0),
        "engine": version.tags.get(TAG_ENGINE, FP32.engine),
        "report": registry.attachment_page(version, settings.mlflow_public_url) if published else None,
    }


def standing(registry: Registry, measured: Mapping[int, float] | None = None) -> dict[str, object]:
    """Champion and previous as they stand now.

    Args:
        registry: whom to ask.
        measured: test accuracies found just now, by version; any other is the one written on the version.

    Returns:
        {"champion": {"name", "version", "architecture", "test_accuracy"} | None, "previous": likewise}.
    """

    def describe(version: ModelVersion | None) -> dict[str, object] | None:
        if version is None:
            return None
        accuracy = (measured or {}).get(version.version, version.figure(TAG_TEST_ACCURACY))
        return {
            "name": version.name,
            "version": version.version,
            "architecture": version.architecture,
            "test_accuracy": _finite(accuracy),
        }

    return {"champion": describe(registry.by_alias(CHAMPION)), "previous": describe(registry.by_alias(PREVIOUS))}


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
