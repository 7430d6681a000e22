"""The gate's rules, one by one and as properties."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ml.evaluation.gate import Contender, Measurement, decide

N = 1000


def measured(accuracy: float, *, n: int = N, loss: float = 1.0) -> Measurement:
    return Measurement(n=n, accuracy=accuracy, precision=accuracy, recall=accuracy, loss=loss)


def contender(version: int, validation: float | None, test: float | Measurement | None, **changes: object) -> Contender:
    figures = measured(test) if isinstance(test, float) else test
    return replace(Contender(version, "baseline", "ds-a", validation, figures), **changes)


def verdicts(decision):
    return {item.version: item.outcome for item in decision.verdicts}


def test_the_better_one_is_promoted_and_the_reason_carries_the_figures():
    decision = decide([contender(2, 0.6, 0.62)], contender(1, 0.5, 0.55))
    assert decision.promoted == 2
    for figure in ("0.6200", "0.5500", "1000", "version 1", "version 2"):
        assert figure in decision.reason


def test_a_tie_keeps_the_champion():
    decision = decide([contender(2, 0.9, 0.55)], contender(1, 0.5, 0.55))
    assert decision.promoted is None
    assert "tie" in decision.reason
    assert verdicts(decision) == {2: "refused"}


def test_the_choice_is_made_by_validation_and_not_by_test():
    lucky, sound = contender(3, 0.60, 0.99), contender(2, 0.61, 0.58)
    decision = decide([lucky, sound], contender(1, 0.5, 0.55))
    assert decision.promoted == 2
    assert verdicts(decision) == {2: "promoted", 3: "refused"}


def test_without_a_champion_it_must_be_above_chance():
    assert decide([contender(1, 0.5, 0.2)], None).promoted == 1
    assert decide([contender(1, 0.5, 0.1)], None).promoted is None
    few = contender(1, 0.5, measured(0.3, n=10))  # 3 of 10: the interval reaches from 0.11 ...
    fewer = contender(1, 0.5, measured(0.2, n=10))  # ... 2 of 10: from 0.06
    assert decide([few], None).promoted == 1
    assert decide([fewer], None).promoted is None


def test_nothing_waiting_is_said():
    decision = decide([], contender(1, 0.5, 0.5))
    assert decision.promoted is None
    assert "Nothing to judge" in decision.reason
    assert decision.verdicts == ()


def test_a_broken_candidate_is_refused_and_does_not_stop_a_sound_one():
    broken = contender(3, 0.99, None, error="the file cannot be loaded")
    decision = decide([broken, contender(2, 0.6, 0.7)], contender(1, 0.5, 0.6))
    assert decision.promoted == 2
    assert verdicts(decision) == {2: "promoted", 3: "refused"}
    assert "the file cannot be loaded" in decision.verdicts[1].reason


@pytest.mark.parametrize(
    "champion",
    [
        contender(1, 0.5, None, error="the file cannot be loaded"),
        contender(1, 0.5, measured(math.nan)),
        contender(1, 0.5, None, dataset_id="ds-b"),
    ],
)
def test_without_a_measured_champion_of_the_same_dataset_candidates_wait(champion):
    decision = decide([contender(2, 0.9, 0.9)], champion)
    assert decision.promoted is None
    assert verdicts(decision) == {2: "pending"}


def test_a_new_lineage_succeeds_a_champion_of_another_dataset():
    champion = contender(1, 0.5, None, dataset_id="ds-b")
    for accuracy, promoted in ((0.5, 2), (0.1, None)):
        decision = decide([contender(2, 0.5, accuracy)], champion, new_lineage=True)
        assert decision.promoted == promoted
        assert "version 1 of dataset ds-b, is not compared with models of ds-a" in decision.reason
        assert "No champion" not in decision.reason


def test_a_new_lineage_excuses_nothing_within_one_dataset():
    assert decide([contender(2, 0.9, 0.5)], contender(1, 0.5, 0.6), new_lineage=True).promoted is None


def test_different_test_images_are_not_compared():
    decision = decide([contender(2, 0.9, measured(0.9, n=500))], contender(1, 0.5, measured(0.5, n=1000)))
    assert decision.promoted is None
    assert "500 against 1000" in decision.reason


def test_mixed_datasets_are_a_programming_error():
    with pytest.raises(ValueError, match="one dataset"):
        decide([contender(1, 0.5, 0.5), contender(2, 0.5, 0.5, dataset_id="ds-b")], None)


any_float = st.floats(allow_nan=True, allow_infinity=True)
ratio = st.integers(0, N).map(lambda k: k / N)
sound = st.builds(measured, ratio, loss=st.floats(0, 20))
anything = st.builds(Measurement, st.integers(-1, 2 * N), any_float, any_float, any_float, any_float) | sound


@st.composite
def fields(draw, figures=anything):
    """Candidates of one dataset, sound and not, and a champion or none."""
    count = draw(st.integers(0, 5))
    candidates = [
        contender(
            10 + i,
            draw(ratio | any_float | st.none()),
            draw(figures | st.none()),
            error=draw(st.none() | st.just("broken")),
        )
        for i in range(count)
    ]
    champion = draw(st.none() | st.builds(lambda figure: contender(1, 0.5, figure), figures | st.none()))
    return candidates, champion


@given(fields(), st.randoms(), st.booleans())
def test_the_same_figures_in_any_order_give_the_same_decision(field, shuffler, new_lineage):
    candidates, champion = field
    decision = decide(candidates, champion, new_lineage=new_lineage)
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    assert repr(decide(shuffled, champion, new_lineage=new_lineage)) == repr(decision)


@given(fields(), st.booleans())
def test_whatever_is_promoted_was_measured_and_beats_the_champion(field, new_lineage):
    candidates, champion = field
    decision = decide(candidates, champion, new_lineage=new_lineage)
    assert [item.version for item in decision.verdicts] == sorted(item.version for item in candidates)
    winners = [item.version for item in decision.verdicts if item.outcome == "promoted"]
    assert winners == ([] if decision.promoted is None else [decision.promoted])
    if decision.promoted is None:
        return
    winner = next(item for item in candidates if item.version == decision.promoted)
    assert winner.error is None
    assert winner.validation_accuracy is not None
    assert 0 <= winner.validation_accuracy <= 1
    figures = (winner.test.accuracy, winner.test.precision, winner.test.recall, winner.test.loss)
    assert all(math.isfinite(value) for value in figures)
    if champion is not None:
        assert champion.error is None
        assert winner.test.accuracy > champion.test.accuracy


@given(fields(sound), ratio, ratio)
def test_a_strictly_better_model_never_loses(field, validation, test):
    candidates, champion = field
    assume(champion is None or (champion.test is not None and test > champion.test.accuracy))
    assume(test > 0.2)
    others = [
        item for item in candidates if item.validation_accuracy is None or not item.validation_accuracy >= validation
    ]
    assert decide([*others, contender(99, validation, test)], champion).promoted == 99
