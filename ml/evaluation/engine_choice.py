"""Whether a version's int8 form may serve in its float32 form's place: decided from figures of both on the same images.

Pure. Predicting and timing is `ml.workflows.engines`'s; the bounds are the policy's. The burden of proof lies on int8:
unlike a champion's challenger it is refused by what could not be shown, be it for want of images.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ml.errors import InputInvalid
from ml.evaluation.comparison import Difference, calibration_difference, paired
from ml.evaluation.gate_policy import Int8
from ml.evaluation.significance import Paired, difference_interval, largest_fall

EngineName = Literal["fp32", "int8"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one image alone, in milliseconds."""

    median_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """What int8 costs and what it gains."""

    pairs: Paired
    """`gained`: only int8 has the image right; `lost`: only float32."""
    accuracy: Difference
    """int8's less float32's, with a 95 % interval."""
    largest_fall: float
    """The one-sided upper bound of the fall in accuracy, at the policy's confidence."""
    calibration_error: Difference
    """int8's less float32's, with a 95 % interval."""
    agreement: float
    """Share of the images that both take for the same class, rightly or wrongly."""
    fp32: Latency
    int8: Latency

    @property
    def speedup(self) -> float:
        """How many times as fast int8 answers one image (medians)."""
        return self.fp32.median_ms / self.int8.median_ms


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The form that is to serve, why, and what was found; None where there was nothing to compare."""

    engine: EngineName
    reason: str
    comparison: EngineComparison | None = None


def compare_engines(
    labels: np.ndarray,
    fp32: np.ndarray,
    int8: np.ndarray,
    latencies: tuple[Latency, Latency],
    *,
    confidence: float,
) -> EngineComparison:
    """Compares the answers of the two forms.

    Args:
        labels: int (n,), the true classes, 0..9.
        fp32: float (n, 10), probabilities for these images, in this order.
        int8: likewise.
        latencies: of float32 and of int8, measured in turns.
        confidence: of the upper bound of the fall.

    Raises:
        InputInvalid: no image, shapes that are no pairs, or what are no probabilities (NaN is none).
    """
    if fp32.shape != int8.shape:
        raise InputInvalid(
            f"Answers {fp32.shape} and {int8.shape} are no pairs.", fix="have both forms predict the same images."
        )
    calibration = calibration_difference(labels, int8, fp32)  # looks at them, too
    by_int8, by_fp32 = int8.argmax(axis=1), fp32.argmax(axis=1)
    pairs = paired(by_int8 == labels, by_fp32 == labels)
    return EngineComparison(
        pairs=pairs,
        accuracy=Difference(pairs.difference, *difference_interval(pairs)),
        largest_fall=largest_fall(pairs, confidence),
        calibration_error=calibration,
        agreement=float((by_int8 == by_fp32).mean()),
        fp32=latencies[0],
        int8=latencies[1],
    )


def choose_engine(found: EngineComparison, policy: Int8) -> EngineChoice:
    """int8 where every demand of the policy is shown to be met, else float32; the reason carries the figures."""
    fell, rose, speedup = found.largest_fall, found.calibration_error, found.speedup
    demands = (
        (
            fell < policy.largest_accuracy_fall,
            f"accuracy {found.accuracy.value:+.4f} on the same {found.pairs.n} images ({found.pairs.gained} gained, "
            f"{found.pairs.lost} lost), fallen by at most {fell:.4f} with {policy.confidence:.0%} confidence, less "
            f"than {policy.largest_accuracy_fall:g} wanted",
        ),
        (
            rose.high <= policy.calibration_margin,
            f"calibration error {rose.value:+.4f} [{rose.low:+.4f}, {rose.high:+.4f}], risen by at most "
            f"{policy.calibration_margin:g} wanted",
        ),
        (
            speedup >= policy.least_speedup,
            f"{speedup:.2f} times as fast ({found.int8.median_ms:.2f} ms for one image, float32 "
            f"{found.fp32.median_ms:.2f} ms), at least {policy.least_speedup:g} wanted",
        ),
    )
    # Written so that NaN meets no demand; infinite ones are met by nobody either.
    finite = all(map(math.isfinite, (fell, rose.value, rose.high, speedup)))
    failed = [says for holds, says in demands if not holds]
    if failed or not finite:
        return EngineChoice("fp32", f"int8 is refused: {'; '.join(failed) or 'a figure is not finite'}.", found)
    return EngineChoice("int8", f"int8 is accepted: {'; '.join(says for _, says in demands)}.", found)
