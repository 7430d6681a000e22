"""The drift test against scipy, its false-alarm rate on unchanged populations, and its power on named shifts."""

import numpy as np
import pytest
from scipy import stats

from ml.monitoring.reference import STATISTIC_NAMES, Sample
from ml.monitoring.statistics import chi_squared_homogeneity, ks_two_sample, test_drift

ALPHA = 0.05  # larger than the setting's default, so that a few hundred windows can tell a wrong rate
WINDOWS = 400


def draw(generator, n, *, prior=None, brightness=0.0, confidence=1.0):
    """A classifier's life in small: classes by a prior, logits that lean to the class, images with statistics."""
    classes = generator.choice(10, n, p=prior)
    logits = generator.normal(0, 1, (n, 10)) + 2.0 * np.eye(10)[classes]
    exponentials = np.exp(confidence * logits)
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    light = generator.normal(0.5, 0.1, n)
    statistics = {name: (light + generator.normal(0, 0.1, n)).astype(np.float32) for name in STATISTIC_NAMES}
    statistics["brightness"] = (light + brightness).astype(np.float32)
    return Sample(probabilities.argmax(axis=1), probabilities, statistics)


def alarms(n, seed, **shift):
    """Which of WINDOWS windows of n predictions raise the alarm; a fresh reference of 5,000 for each."""
    p_values = np.empty(WINDOWS if not shift else 40)
    generator = np.random.default_rng(seed)
    for i in range(len(p_values)):
        p_values[i] = test_drift(draw(generator, 5000), draw(generator, n, **shift), ALPHA).p_value
    return p_values


@pytest.mark.parametrize("n", [2, 7, 100, 500, 2000])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_ks_is_scipys(n, shift):
    generator = np.random.default_rng(n)
    reference = generator.normal(size=5000).astype(np.float32)
    current = (generator.normal(size=n) + shift).astype(np.float32)
    expected = stats.ks_2samp(reference, current, method="asymp")
    assert ks_two_sample(reference, current) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_ks_with_ties_is_scipys():
    generator = np.random.default_rng(3)
    reference, current = generator.integers(0, 8, 5000), generator.integers(0, 8, 300) // 2
    expected = stats.ks_2samp(reference, current, method="asymp")
    assert ks_two_sample(reference, current) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


@pytest.mark.parametrize("n", [100, 500])
def test_ks_is_close_to_the_exact_distribution(n):
    generator = np.random.default_rng(4)
    reference = generator.random(5000)
    for shift in (0.0, 0.06, 0.1):
        current = np.clip(generator.random(n) + shift, 0, 2)
        exact = stats.ks_2samp(reference, current, method="exact").pvalue
        if exact > 1e-4:
            assert ks_two_sample(reference, current)[1] == pytest.approx(exact, rel=0.03)


def test_chi_squared_is_scipys_where_no_cell_is_sparse():
    generator = np.random.default_rng(5)
    reference, current = generator.multinomial(5000, np.full(10, 0.1)), generator.multinomial(300, np.full(10, 0.1))
    expected = stats.chi2_contingency([reference, current], correction=False)
    assert chi_squared_homogeneity(reference, current) == pytest.approx((expected.statistic, expected.pvalue))


def test_sparse_cells_are_merged_rarest_first():
    reference = np.array([900, 20, 30, 50, 0, 0, 0, 0, 0, 0])
    current = np.array([80, 9, 6, 5, 0, 0, 0, 0, 0, 0])
    # 100 of 1,100: the classes seen 29 and 36 times are expected 2.6 and 3.3 times, together 5.9.
    expected = stats.chi2_contingency([[900, 50, 50], [80, 15, 5]], correction=False)
    assert chi_squared_homogeneity(reference, current) == pytest.approx((expected.statistic, expected.pvalue))


def test_counts_that_can_show_nothing_show_nothing():
    assert chi_squared_homogeneity(np.array([500, 500]), np.array([2, 1])) == (0.0, 1.0)
    assert chi_squared_homogeneity(np.array([500, 0]), np.array([300, 0])) == (0.0, 1.0)


@pytest.mark.parametrize("n", [100, 1000])
def test_false_alarms_stay_within_the_rate_that_was_asked_for(n):
    p_values = alarms(n, seed=n)
    assert np.sum(p_values <= ALPHA) <= stats.binom.ppf(0.999, WINDOWS, ALPHA)
    # Holm over dependent columns is conservative; were it blind, no p-value would ever be small.
    assert np.sum(p_values <= 0.5) >= stats.binom.ppf(0.001, WINDOWS, 0.25)


@pytest.mark.parametrize(
    ("shift", "n", "column"),
    [
        ({"brightness": 0.06}, 200, "brightness"),
        ({"prior": [0.3, *[0.7 / 9] * 9]}, 500, "predicted_class"),
        ({"confidence": 0.5}, 200, "p_"),
    ],
)
def test_named_shifts_are_caught(shift, n, column):
    assert np.all(alarms(n, seed=1, **shift) <= ALPHA)
    generator = np.random.default_rng(2)
    found = test_drift(draw(generator, 5000), draw(generator, n, **shift), ALPHA)
    assert any(name.startswith(column) for name in found.drifted_columns)


@pytest.mark.parametrize("confidence", [1.0, 0.9, 0.5])
def test_one_level_shows_the_columns_that_holm_rejected(confidence):
    generator = np.random.default_rng(8)
    found = test_drift(draw(generator, 5000), draw(generator, 400, confidence=confidence), ALPHA)
    assert {c.name for c in found.columns if c.p_value <= found.column_level} == set(found.drifted_columns)
    assert found.drifted == bool(found.drifted_columns)
    assert found.p_value == min(1.0, 16 * min(c.p_value for c in found.columns))
    assert [c.name for c in found.columns] == [f"p_{i}" for i in range(10)] + [*STATISTIC_NAMES, "predicted_class"]


def test_a_broken_column_is_drift_and_not_an_error():
    generator = np.random.default_rng(9)
    current = draw(generator, 200)
    current.statistics["noise"][:] = np.nan
    assert test_drift(draw(generator, 5000), current, ALPHA).drifted_columns == ("noise",)


def test_nothing_to_compare_is_refused():
    sample = draw(np.random.default_rng(0), 10)
    with pytest.raises(ValueError, match="two predictions are needed"):
        test_drift(sample, draw(np.random.default_rng(0), 1), ALPHA)
    with pytest.raises(ValueError, match="alpha is a probability"):
        test_drift(sample, sample, 1.0)
