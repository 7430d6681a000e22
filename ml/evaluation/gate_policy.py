"""What the gate demands: frozen, strict values, read from a TOML file (setting GATE_POLICY; see `policies/gate.toml`).

Owns the bounds. `ml.evaluation.gate` applies them; what they bound is measured by `ml.workflows.judging`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ml.errors import ConfigurationError
from ml.toml_files import nearest, read_toml

Share = Annotated[float, Field(ge=0, le=1)]
Inner = Annotated[float, Field(gt=0, lt=1)]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Mechanical(BaseModel):
    """Of a version as the registry hands it out, in a fresh process."""

    model_config = _STRICT

    agreement_images: int = Field(ge=1)
    """Test images on which the ONNX file and the Keras file must agree; fewer where there are fewer."""
    agreement: float = Field(gt=0, le=1)
    """Largest difference of a probability between the two."""
    p95_latency_ms: float = Field(gt=0)
    """Of one encoded image through the server's decoder and engine, alone."""
    size_mib: float = Field(gt=0)
    """Of the ONNX file."""


class Absolute(BaseModel):
    """On the test images, whoever serves. Each holds where the 95 % interval lies wholly on its right side."""

    model_config = _STRICT

    accuracy: Share
    """At least."""
    calibration_error: Share
    """At most."""
    corrupted_accuracy: Share
    """At least: the mean over the 75 cells of CIFAR-10-C."""
    corrupted_images: int = Field(ge=2)
    """Test images in each of these cells; fewer where there are fewer."""


class AgainstChampion(BaseModel):
    """Paired with the model that serves, on the same images."""

    model_config = _STRICT

    level: Inner
    """Of each family of tests: the exact McNemar test, two-sided; the ten classes together, after Holm."""
    power: Inner
    """At which the smallest true difference that the test sees is stated."""
    class_margin: Share
    """No class's recall may be shown to have fallen by more."""
    corrupted_margin: Share
    """Nor may the mean accuracy under corruption."""
    calibration_margin: Share
    """Nor may the calibration error be shown to have risen by more."""


class Shadow(BaseModel):
    """On mirrored requests, where a promotion waits for them."""

    model_config = _STRICT

    failures: Share
    """Largest share of the mirrored images that the candidate may leave unanswered."""
    disagreement_margin: Share
    """By how much the share of images that the two take for different classes may be shown to exceed the share on the
    test images: more of it means that live images are unlike those that the candidate was judged on."""
    p95_latency_ms: float = Field(gt=0)
    """Of the engine's answer to one request."""


class Int8(BaseModel):
    """Of an int8 form, paired with the float32 form on the test images: when it serves in that one's place."""

    model_config = _STRICT

    wanted: bool
    """Whether an int8 form may be chosen at all."""
    confidence: Inner
    """Of the one-sided upper bound of the fall in accuracy."""
    largest_accuracy_fall: Inner
    """That bound must lie below it: the fall is shown to be smaller, and not only not shown to be larger."""
    calibration_margin: Share
    """The calibration error is shown to rise by no more: the whole 95 % interval lies within."""
    least_speedup: float = Field(ge=0)
    """How many times as fast as float32 it must answer one image (medians, on the machine that judges); 0: any."""
    agreement: Share
    """Inspected, it must take at least this share of the images for the class that float32 takes them for."""
    golden_agreement: float = Field(gt=0, le=1)
    """Largest difference of a probability of a golden image from the one kept: a value that rounds to the next of 256
    levels on another machine moves it further than float32's noise."""


class GatePolicy(BaseModel):
    """All of it."""

    model_config = _STRICT

    mechanical: Mechanical
    absolute: Absolute
    champion: AgainstChampion
    shadow: Shadow
    int8: Int8


def load_policy(path: Path) -> GatePolicy:
    """Reads and checks a policy file.

    Raises:
        ConfigurationError: it cannot be read, is not TOML, or holds an unknown key (the nearest known one is named), a
            missing or an impossible one.
    """
    try:
        return GatePolicy.model_validate(read_toml(path))
    except ValidationError as error:
        wrong = "; ".join(_explain(item) for item in error.errors())
        raise ConfigurationError(
            f"{path} cannot be used: {wrong}.",
            fix="correct these values; policies/gate.toml of the project shows every key and what it means.",
        ) from error


def _explain(item: object) -> str:
    assert isinstance(item, dict)  # noqa: S101 - pydantic's own
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        sections = {name: field.annotation for name, field in GatePolicy.model_fields.items()}
        known = list(sections[location[0]].model_fields) if len(location) > 1 else list(sections)  # type: ignore[union-attr]
        return f"unknown key {key!r}{nearest(location[-1], known)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {item['input']!r}: {item['msg']}"
