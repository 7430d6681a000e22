"""Which form serves: int8 where it is shown to cost little, float32 wherever it is not."""

from dataclasses import replace

import numpy as np
import pytest

from ml.errors import InputInvalid
from ml.evaluation.comparison import Difference
from ml.evaluation.engine_choice import Latency, choose_engine, compare_engines
from ml.evaluation.gate_policy import load_policy
from ml.settings import PROJECT_ROOT

POLICY = load_policy(PROJECT_ROOT / "policies" / "gate.toml").int8
LATENCIES = (Latency(8.0, 9.0), Latency(4.0, 5.0))
N = 10_000


def said(right: np.ndarray, confidence: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and answers that are right there and sure to that extent."""
    labels = np.arange(len(right)) % 10
    given = np.where(right, labels, (labels + 1) % 10)
    return labels, np.full((len(right), 10), (1 - confidence) / 9) + (confidence - (1 - confidence) / 9) * np.eye(10)[
        given
    ]


def compared(gained: int, lost: int, n: int = N, sure: float = 0.9):
    """Nine of ten right in float32; int8 gains and loses so many, and is so sure of what it says."""
    fp32 = np.arange(n) % 10 != 0
    int8 = fp32.copy()
    int8[np.flatnonzero(~fp32)[:gained]] = True
    int8[np.flatnonzero(fp32)[:lost]] = False
    labels, by_fp32 = said(fp32)
    return compare_engines(labels, by_fp32, said(int8, sure)[1], LATENCIES, confidence=POLICY.confidence)


def test_a_fall_that_is_shown_to_be_small_is_accepted_with_its_figures():
    choice = choose_engine(compared(gained=1, lost=21), POLICY)  # 0.2 points on 10,000 images
    assert choice.engine == "int8"
    for figure in ("-0.0020", "10000 images", "1 gained", "21 lost", "95% confidence", "less than 0.003", "2.00 times"):
        assert figure in choice.reason


@pytest.mark.parametrize(
    ("gained", "lost", "n"),
    [
        (0, 50, N),  # 0.5 points
        (0, 30, N),  # the bound itself
        (90, 110, N),  # 0.2 points, but of so many disagreements that 0.3 are not ruled out
        (0, 0, 500),  # not one differs, of too few
    ],
)
def test_a_fall_that_may_be_larger_is_refused(gained, lost, n):
    choice = choose_engine(compared(gained, lost, n), POLICY)
    assert choice.engine == "fp32"
    assert "fallen by at most" in choice.reason


def test_calibration_that_worsens_is_refused_though_every_class_is_the_same():
    assert choose_engine(compared(0, 0), POLICY).engine == "int8"
    choice = choose_engine(compared(0, 0, sure=0.93), POLICY)
    assert choice.engine == "fp32"
    assert "calibration error +0.0300" in choice.reason
    assert choose_engine(compared(0, 0, sure=0.901), POLICY).engine == "int8"


def test_what_is_no_faster_is_refused():
    slow = replace(compared(0, 0), int8=LATENCIES[0])
    assert choose_engine(slow, POLICY).engine == "fp32"
    assert "1.00 times as fast" in choose_engine(slow, POLICY).reason
    assert choose_engine(slow, POLICY.model_copy(update={"least_speedup": 0.0})).engine == "int8"


@pytest.mark.parametrize("nothing", [float("nan"), float("inf")])
def test_what_is_no_figure_is_never_accepted(nothing):
    found = compared(0, 0)
    for broken in (
        replace(found, largest_fall=nothing),
        replace(found, calibration_error=Difference(nothing, nothing, nothing)),
        replace(found, fp32=Latency(nothing, 1.0)),
    ):
        assert choose_engine(broken, POLICY).engine == "fp32"


def test_answers_that_are_no_probabilities_are_not_compared():
    labels, answers = said(np.ones(20, bool))
    broken = answers.copy()
    broken[3, 4] = np.nan
    for wrong in (broken, answers[:5], 2 * answers):
        with pytest.raises(InputInvalid):
            compare_engines(labels, answers, wrong, LATENCIES, confidence=0.95)
