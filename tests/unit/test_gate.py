"""The gate's rules, one by one and as properties."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ml.evaluation.comparison import Comparison, compare
from ml.evaluation.gate import (
    Champion,
    Contender,
    Decision,
    ShadowSummary,
    absolute_checks,
    after_shadow,
    at_least,
    at_most,
    decide,
    postponed,
    shadow_checks,
)
from ml.evaluation.gate_policy import GatePolicy, load_policy
from ml.evaluation.measurement import calibration_interval, measure
from ml.evaluation.metrics import calibration_error
from ml.evaluation.robustness import robustness
from ml.settings import PROJECT_ROOT

POLICY = load_policy(PROJECT_ROOT / "policies" / "gate.toml")
CHAMPION = Champion(1, "baseline", "ds-a")
PASSED = (at_least("accuracy", 0.7, (0.68, 0.72), 0.5),)
FAILED = (*PASSED, at_most("calibration error", 0.3, (0.2, 0.4), 0.2))


def probabilities(classes: np.ndarray) -> np.ndarray:
    """Of models that are 73 % sure of what they say."""
    return np.full((len(classes), 10), 0.03) + 0.7 * np.eye(10)[classes]


def compared(n: int, gained: int, lost: int, both: int = 0, policy: GatePolicy = POLICY) -> Comparison:
    """A comparison with so many images that only the candidate, only the champion, and both have right."""
    labels = np.arange(n) % 10
    wrong = (labels + 1) % 10
    mine, theirs = wrong.copy(), wrong.copy()
    mine[:gained], theirs[gained : gained + lost] = labels[:gained], labels[gained : gained + lost]
    rest = slice(gained + lost, gained + lost + both)
    mine[rest], theirs[rest] = labels[rest], labels[rest]
    demands = policy.champion
    return compare(
        labels,
        probabilities(mine),
        probabilities(theirs),
        version=1,
        level=demands.level,
        power=demands.power,
        class_margin=demands.class_margin,
    )


BETTER, EQUAL, WORSE = compared(1000, 60, 20), compared(1000, 40, 40), compared(1000, 20, 60)


def contender(version: int, validation: float | None, comparison: Comparison | None = None, **changes) -> Contender:
    return replace(Contender(version, "baseline", "ds-a", validation, PASSED, comparison), **changes)


def outcomes(decision: Decision) -> dict[int, str]:
    return {item.version: item.outcome for item in decision.verdicts}


def test_a_better_one_is_promoted_and_the_reason_carries_the_figures():
    decision = decide([contender(2, 0.6, BETTER)], CHAMPION, POLICY)
    assert decision.promoted == 2
    for figure in ("+0.0400", "1000 images", "60 gained", "20 lost", "version 1", "version 2", "would be seen"):
        assert figure in decision.reason
    assert {check.group for check in decision.verdicts[0].checks} == {"absolute", "champion"}


@pytest.mark.parametrize("comparison", [EQUAL, WORSE, compared(1000, 41, 39), None, replace(BETTER, champion=7)])
def test_a_tie_a_worse_one_one_that_cannot_be_told_apart_and_one_that_was_not_compared_keep_the_champion(comparison):
    decision = decide([contender(2, 0.9, comparison)], CHAMPION, POLICY)
    assert decision.promoted is None
    assert outcomes(decision) == {2: "refused"}


def test_a_tie_is_called_one():
    assert "a tie keeps the champion" in decide([contender(2, 0.9, EQUAL)], CHAMPION, POLICY).reason


def test_the_choice_is_made_by_validation_and_not_by_test():
    lucky, sound = contender(3, 0.60, compared(1000, 200, 0)), contender(2, 0.61, BETTER)
    decision = decide([lucky, sound], CHAMPION, POLICY)
    assert outcomes(decision) == {2: "promoted", 3: "refused"}
    assert "0.6100 against 0.6000" in decision.verdicts[1].reason


def test_without_a_champion_the_checks_alone_decide():
    assert decide([contender(1, 0.5)], None, POLICY).promoted == 1
    decision = decide([contender(1, 0.5, checks=FAILED)], None, POLICY)
    assert decision.promoted is None
    assert "calibration error: 0.3000 [0.2000, 0.4000], at most 0.2 wanted" in decision.reason


def test_nothing_waiting_is_said():
    decision = decide([], CHAMPION, POLICY)
    assert (decision.promoted, decision.verdicts) == (None, ())
    assert "Nothing to judge" in decision.reason


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"error": "the file cannot be loaded"}, "the file cannot be loaded"),
        ({"checks": ()}, "not measured"),
        ({"checks": FAILED}, "calibration error"),
        ({"validation_accuracy": None}, "no validation accuracy"),
        ({"validation_accuracy": math.nan}, "nan"),
        ({"validation_accuracy": 1.2}, "1.2"),
    ],
)
def test_a_broken_candidate_is_refused_and_does_not_stop_a_sound_one(broken, why):
    decision = decide([contender(3, 0.99, BETTER, **broken), contender(2, 0.6, BETTER)], CHAMPION, POLICY)
    assert outcomes(decision) == {2: "promoted", 3: "refused"}
    assert why in decision.verdicts[1].reason


@pytest.mark.parametrize("champion", [replace(CHAMPION, error="no file"), replace(CHAMPION, dataset_id="ds-b")])
def test_without_a_measured_champion_of_the_same_dataset_candidates_wait(champion):
    decision = decide([contender(2, 0.9, BETTER), contender(3, 0.9, checks=FAILED)], champion, POLICY)
    assert decision.promoted is None
    assert outcomes(decision) == {2: "pending", 3: "refused"}


def test_a_new_lineage_succeeds_a_champion_of_another_dataset_by_the_checks_alone():
    other = replace(CHAMPION, dataset_id="ds-b")
    decision = decide([contender(2, 0.5)], other, POLICY, new_lineage=True)
    assert decision.promoted == 2
    assert "version 1 of dataset ds-b, is not compared with models of ds-a" in decision.reason
    assert decide([contender(2, 0.5, checks=FAILED)], other, POLICY, new_lineage=True).promoted is None
    assert decide([contender(2, 0.9, WORSE)], CHAMPION, POLICY, new_lineage=True).promoted is None, "same dataset"


def test_a_class_that_fell_too_far_refuses_a_model_that_is_better_on_the_whole():
    rng, labels = np.random.default_rng(1), np.arange(20_000) % 10
    theirs = np.where(rng.random(20_000) < 0.25, (labels + 1) % 10, labels)
    mine = np.where(rng.random(20_000) < np.where(labels == 3, 0.4, 0.18), (labels + 1) % 10, labels)
    found = compare(
        labels, probabilities(mine), probabilities(theirs), version=1, level=0.05, power=0.8, class_margin=0.05
    )
    assert found.p_value < 1e-6
    assert found.accuracy.value > 0.03
    decision = decide([contender(2, 0.9, found)], CHAMPION, POLICY)
    assert decision.promoted is None
    assert [check.name for check in decision.verdicts[0].checks if not check.holds] == ["cat: recall"]


def test_mixed_datasets_are_a_programming_error():
    with pytest.raises(ValueError, match="one dataset"):
        decide([contender(1, 0.5), contender(2, 0.5, dataset_id="ds-b")], None, POLICY)


def drawn(rng: np.random.Generator, n: int, ahead: float, disagreement: float = 0.16) -> Comparison:
    """Two models whose true accuracies differ by `ahead`."""
    gained, lost, _ = rng.multinomial(n, [(disagreement + ahead) / 2, (disagreement - ahead) / 2, 1 - disagreement])
    return compared(n, int(gained), int(lost), both=int(0.7 * n))


def few_resamples(monkeypatch):
    """For tests of decisions that hang on no interval."""
    monkeypatch.setattr("ml.evaluation.comparison._CALIBRATION_RESAMPLES", 20)
    monkeypatch.setattr("ml.evaluation.significance.RESAMPLES", 100)


def test_two_points_worse_is_refused_and_equal_is_seldom_taken_for_better(monkeypatch):
    few_resamples(monkeypatch)
    rng = np.random.default_rng(5)

    def promoted(ahead: float) -> int:
        return sum(
            decide([contender(2, 0.9, drawn(rng, 10_000, ahead))], CHAMPION, POLICY).promoted == 2 for _ in range(100)
        )

    assert promoted(-0.02) <= 1
    assert promoted(0.0) <= 5
    assert promoted(0.02) >= 95


ratio = st.floats(0, 1)
any_float = st.floats(allow_nan=True, allow_infinity=True)
checks = st.lists(
    st.builds(at_least, st.just("accuracy"), any_float, st.tuples(any_float, any_float), ratio)
    | st.builds(at_most, st.just("calibration error"), any_float, st.tuples(any_float, any_float), ratio)
    | st.sampled_from(FAILED),
    max_size=3,
).map(tuple)
comparisons = st.sampled_from([BETTER, EQUAL, WORSE, None, replace(BETTER, champion=7)])


@st.composite
def fields(draw: st.DrawFn) -> tuple[list[Contender], Champion | None]:
    """Candidates of one dataset, sound and not, and a champion or none."""
    candidates = [
        contender(
            10 + i,
            draw(ratio | any_float | st.none()),
            draw(comparisons),
            checks=draw(checks | st.just(PASSED)),
            error=draw(st.none() | st.just("broken")),
        )
        for i in range(draw(st.integers(0, 5)))
    ]
    error = st.none() | st.just("broken")
    champion = st.builds(Champion, st.just(1), st.just("baseline"), st.sampled_from(["ds-a", "ds-b"]), error)
    return candidates, draw(st.none() | champion)


@given(fields(), st.randoms(), st.booleans())
def test_the_same_figures_in_any_order_give_the_same_decision(field, shuffler, new_lineage):
    candidates, champion = field
    decision = decide(candidates, champion, POLICY, new_lineage=new_lineage)
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    assert repr(decide(shuffled, champion, POLICY, new_lineage=new_lineage)) == repr(decision)


@given(fields(), st.booleans())
def test_whatever_is_promoted_was_measured_and_passed_everything(field, new_lineage):
    candidates, champion = field
    decision = decide(candidates, champion, POLICY, new_lineage=new_lineage)
    assert [item.version for item in decision.verdicts] == sorted(item.version for item in candidates)
    winners = [item for item in decision.verdicts if item.outcome == "promoted"]
    assert [item.version for item in winners] == ([] if decision.promoted is None else [decision.promoted])
    for winner in winners:
        contender = next(item for item in candidates if item.version == winner.version)
        assert contender.error is None
        assert contender.validation_accuracy is not None
        assert 0 <= contender.validation_accuracy <= 1
        assert winner.checks
        assert all(check.holds for check in winner.checks)
        assert all(math.isfinite(value) for check in winner.checks for value in (check.figure, check.low, check.high))
        if champion is not None and champion.dataset_id == "ds-a":
            assert champion.error is None
            assert contender.comparison is BETTER


@given(fields(), ratio)
def test_a_model_that_is_better_in_everything_never_loses(field, validation):
    candidates, champion = field
    assume(champion is None or (champion.error is None and champion.dataset_id == "ds-a"))
    others = [
        item for item in candidates if item.validation_accuracy is None or not item.validation_accuracy >= validation
    ]
    assert decide([*others, contender(99, validation, BETTER)], champion, POLICY).promoted == 99


@settings(max_examples=40)
@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 10), st.integers(0, 10))
def test_a_model_that_gets_more_right_stays_eligible(gained, lost, more, fewer):
    """Of what the champion has wrong it gets more right, of what the champion has right fewer wrong."""
    with pytest.MonkeyPatch.context() as patch:
        few_resamples(patch)
        once = compared(400, gained, lost)
        again = compared(400, gained + more, max(lost - fewer, 0), both=min(fewer, lost))
    assume(decide([contender(2, 0.9, once)], CHAMPION, POLICY).promoted)
    assert decide([contender(2, 0.9, again)], CHAMPION, POLICY).promoted


SEEN = ShadowSummary(n=200, disagreements=30, failures=0, p95_ms=9.0, champion_p95_ms=4.0)


def shadowed(**changes) -> Decision:
    decision = decide([contender(2, 0.6, BETTER), contender(3, 0.5, WORSE)], CHAMPION, POLICY)
    return after_shadow(decision, shadow_checks(replace(SEEN, **changes), BETTER, POLICY))


def test_a_winner_that_does_well_on_mirrored_requests_is_promoted_and_the_reason_says_so():
    decision = shadowed()
    assert decision.promoted == 2
    assert outcomes(decision) == {2: "promoted", 3: "refused"}
    assert {check.group for check in decision.verdicts[0].checks} == {"absolute", "champion", "shadow"}
    for figure in ("60 gained", "0 of 200 images failed", "0.1500 [", "9.0 ms", "4.0 ms"):
        assert figure in decision.reason


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"failures": 1}, "answers to mirrored requests"),
        ({"disagreements": 90}, "disagreement on mirrored requests"),
        ({"p95_ms": 200.1}, "p95 latency on mirrored requests"),
        ({"p95_ms": math.nan}, "p95 latency on mirrored requests"),
    ],
)
def test_a_winner_that_does_badly_on_mirrored_requests_is_refused_for_it(changes, failed):
    decision = shadowed(**changes)
    assert decision.promoted is None
    assert outcomes(decision) == {2: "refused", 3: "refused"}
    assert failed in decision.reason
    assert [check.name for check in decision.verdicts[0].checks if not check.holds] == [failed]


def test_one_that_answered_no_mirrored_request_is_refused():
    decision = shadowed(n=3, disagreements=0, failures=3, p95_ms=math.nan)
    assert decision.promoted is None
    assert "no image was answered" in decision.reason


def test_disagreement_is_bounded_by_what_the_test_images_showed():
    alike = replace(BETTER, differing=0.1)
    bound = shadow_checks(SEEN, alike, POLICY)[1]
    assert (bound.figure, bound.bound) == (0.15, pytest.approx(0.3))
    assert shadow_checks(replace(SEEN, disagreements=65), alike, POLICY)[1].holds, "within the interval's reach"
    assert not shadow_checks(replace(SEEN, disagreements=90), alike, POLICY)[1].holds
    unknown = shadow_checks(replace(SEEN, disagreements=199), None, POLICY)[1]
    assert unknown.holds
    assert "not bounded" in unknown.says


def test_a_winner_that_has_not_seen_enough_waits():
    decision = postponed(decide([contender(2, 0.6, BETTER)], CHAMPION, POLICY), "It waits.")
    assert (decision.promoted, outcomes(decision)) == (None, {2: "pending"})
    assert decision.reason.startswith("It waits. version 2 (baseline) is better")


def test_the_absolute_checks_are_those_of_the_figures():
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), np.arange(200) % 10
    answers = np.where(rng.random(200) < 0.2, (labels + 1) % 10, labels)
    corrupted = robustness(lambda x: probabilities(labels[: len(x)]), images[:20], labels[:20], seed=0)
    found = measure(labels, probabilities(answers), corrupted)
    checks = {check.name: check for check in absolute_checks(found, POLICY)}
    assert checks["accuracy"].figure == found.metrics.accuracy
    assert (checks["accuracy"].low, checks["accuracy"].bound) == (found.metrics.accuracy_low, POLICY.absolute.accuracy)
    assert checks["calibration error"].high == found.calibration_high
    assert checks["accuracy under corruption"].figure == corrupted.mean_accuracy
    assert not absolute_checks(replace(found, robustness=None), POLICY)[2].holds


def test_the_interval_of_the_calibration_error_is_the_bootstraps():
    rng = np.random.default_rng(3)
    labels, n = np.arange(500) % 10, 500
    rows = probabilities(np.where(rng.random(n) < 0.4, (labels + 1) % 10, labels))
    drawn = [calibration_error(labels[at], rows[at]) for at in rng.integers(0, n, (2000, n))]
    assert calibration_interval(labels, rows) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.005)
