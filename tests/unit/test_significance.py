"""The gate's statistics against scipy and statsmodels, against brute force, and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap, norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests

from ml.errors import InputInvalid
from ml.evaluation.significance import (
    Paired,
    difference_interval,
    fallen_by_more_than,
    holm,
    largest_fall,
    mcnemar,
    power_of,
    smallest_seen,
    student_interval,
)


@st.composite
def counted(draw: st.DrawFn) -> Paired:
    n = draw(st.integers(1, 5000))
    gained = draw(st.integers(0, n))
    return Paired(n, gained, draw(st.integers(0, n - gained)))


@given(counted())
def test_mcnemar_is_statsmodels_exact_test(pairs: Paired) -> None:
    table = [[pairs.n - pairs.gained - pairs.lost, pairs.gained], [pairs.lost, 0]]
    assert mcnemar(pairs) == pytest.approx(min(reference_mcnemar(table, exact=True).pvalue, 1.0), rel=1e-9, abs=1e-300)


@settings(max_examples=25)  # the reference takes 20 ms
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    np.testing.assert_allclose(holm(np.array(p_values)), multipletests(p_values, method="holm")[1])


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 by 4, 3, 2, 1: 0.02, 0.03, 0.06, then 0.04 raised to 0.06.
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


@given(counted())
def test_a_margin_of_nought_is_mcnemars_score(pairs: Paired) -> None:
    disagreements = pairs.gained + pairs.lost
    expected = norm.cdf((pairs.gained - pairs.lost) / np.sqrt(disagreements)) if disagreements else 1.0
    assert fallen_by_more_than(0.0, pairs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "gained", "lost"), [(200, 10, 31), (50, 0, 4), (1000, 90, 70), (30, 3, 0), (40, 0, 0)])
@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
def test_the_margins_test_is_the_score_at_the_restricted_maximum_of_the_likelihood(
    n: int, gained: int, lost: int, margin: float
) -> None:
    """Tango's closed form against a search for the maximum."""

    def minus_log_likelihood(p_lost: float) -> float:
        p_gained = p_lost - margin
        rest = 1 - p_lost - p_gained
        return -sum(
            k * np.log(max(p, 1e-300)) for k, p in ((gained, p_gained), (lost, p_lost), (n - gained - lost, rest)) if k
        )

    found = minimize_scalar(
        minus_log_likelihood, bounds=(margin, (1 + margin) / 2), method="bounded", options={"xatol": 1e-12}
    )
    p_lost = found.x
    z = (gained - lost + n * margin) / np.sqrt(n * (2 * p_lost - margin - margin**2))
    assert fallen_by_more_than(margin, Paired(n, gained, lost)) == pytest.approx(norm.cdf(z), rel=1e-3)


def test_the_margins_test_holds_its_level_and_has_power() -> None:
    rng = np.random.default_rng(3)
    n, margin = 1000, 0.05
    at_margin = rng.multinomial(n, [0.04, 0.09, 0.87], size=2000)
    beyond = rng.multinomial(n, [0.02, 0.12, 0.86], size=500)
    refused = np.mean([fallen_by_more_than(margin, Paired(n, int(g), int(lost))) <= 0.05 for g, lost, _ in at_margin])
    seen = np.mean([fallen_by_more_than(margin, Paired(n, int(g), int(lost))) <= 0.05 for g, lost, _ in beyond])
    assert refused == pytest.approx(0.05, abs=0.015)
    assert seen > 0.95


@settings(max_examples=50)
@given(counted())
def test_the_largest_fall_is_where_the_margins_test_turns(pairs: Paired) -> None:
    fall = largest_fall(pairs, 0.95)
    assert 0 <= fall < 1
    assert fall >= -pairs.difference - 1e-9
    if fall > 1e-6:
        assert 1 - fallen_by_more_than(fall - 1e-7, pairs) > 0.05
    if fall < 0.999:
        assert 1 - fallen_by_more_than(fall + 1e-7, pairs) < 0.05 + 1e-6


def test_the_largest_fall_covers_the_true_one_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(4).multinomial(10_000, [0.004, 0.007, 0.989], size=1000)
    covered = np.mean([largest_fall(Paired(10_000, int(g), int(lost)), 0.95) >= 0.003 for g, lost, _ in drawn])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_bootstrap_interval_is_scipys() -> None:
    pairs = Paired(400, 40, 22)
    signs = np.repeat([1, -1, 0], [40, 22, 338])
    theirs = bootstrap((signs,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert difference_interval(pairs) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_students_interval_is_scipys() -> None:
    values = np.random.default_rng(1).normal(size=30)
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(("n", "disagreement"), [(10_000, 0.1), (10_000, 0.3), (2000, 0.2)])
def test_the_smallest_difference_seen_is_seen_so_often(n: int, disagreement: float) -> None:
    least = smallest_seen(n, disagreement, level=0.05, power=0.8)
    shares = [(disagreement + least) / 2, (disagreement - least) / 2, 1 - disagreement]
    drawn = np.random.default_rng(2).multinomial(n, shares, size=1000)
    seen = np.mean([mcnemar(Paired(n, int(g), int(lost))) <= 0.05 for g, lost, _ in drawn])
    assert seen == pytest.approx(0.8, abs=0.04)  # the exact test is a little conservative


@given(counted())
def test_what_can_be_said_of_any_counts(pairs: Paired) -> None:
    mirrored = Paired(pairs.n, pairs.lost, pairs.gained)
    assert mcnemar(pairs) == pytest.approx(mcnemar(mirrored))
    low, high = difference_interval(pairs)
    assert -1 <= low <= high <= 1
    assert 0 <= fallen_by_more_than(0.05, pairs) <= 1
    assert smallest_seen(pairs.n, pairs.disagreement, 0.05, 0.8) <= pairs.disagreement


@pytest.mark.parametrize(("n", "gained", "lost"), [(0, 0, 0), (5, -1, 0), (5, 0, -1), (5, 3, 3)])
def test_counts_that_cannot_be_are_refused(n: int, gained: int, lost: int) -> None:
    with pytest.raises(InputInvalid, match="lost of"):
        Paired(n, gained, lost)


@given(st.integers(50, 20_000), st.floats(0.02, 0.6), st.sampled_from([0.01, 0.05]), st.sampled_from([0.7, 0.8, 0.9]))
def test_the_power_at_the_smallest_difference_seen_is_the_one_asked_for(n, disagreement, level, power):
    seen = smallest_seen(n, disagreement, level, power)
    reached = power_of(seen, n, disagreement, level)
    assert reached == pytest.approx(power, abs=1e-6) if seen < disagreement else reached <= power + 1e-6


@pytest.mark.parametrize(
    ("n", "disagreement", "difference"), [(10_000, 0.16, 0.01), (10_000, 0.1, 0.012), (2000, 0.2, 0.02)]
)
def test_the_power_is_how_often_the_test_finds_the_difference(n, disagreement, difference):
    rng = np.random.default_rng(11)
    shares = [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement]
    draws = rng.multinomial(n, shares, size=1500)
    found = [mcnemar(Paired(n, int(gained), int(lost))) <= 0.05 and gained > lost for gained, lost, _ in draws]
    # Four standard errors of the simulation (0.05), and what the exact test gives away for being one of whole counts.
    assert float(np.mean(found)) == pytest.approx(power_of(difference, n, disagreement, 0.05), abs=0.06)


def test_where_all_or_none_disagree_the_power_is_certain():
    assert power_of(0.0, 100, 0.0, 0.05) == 0.0
    assert power_of(1.0, 100, 1.0, 0.05) == 1.0
    assert power_of(1.0, 1, 1.0, 0.05) == 0.0
    for wrong in ((0.2, 100, 0.1, 0.05), (-0.1, 100, 0.1, 0.05), (0.0, 0, 0.1, 0.05), (0.0, 10, 0.1, 1.0)):
        with pytest.raises(InputInvalid):
            power_of(*wrong)
