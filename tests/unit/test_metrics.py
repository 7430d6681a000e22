"""Metrics against scikit-learn, and by hand where scikit-learn has none."""

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from ml.datasets.labels import CLASS_NAMES
from ml.errors import InputInvalid
from ml.evaluation.metrics import calibration_error, evaluate, reliability, wilson_interval


def _predictions(n: int = 700, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    logits = rng.normal(size=(n, 10)) + 1.5 * np.eye(10)[labels]
    probabilities = np.exp(logits)
    return labels, (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("classes", [10, 7])
def test_every_figure_is_scikit_learns(classes: int) -> None:
    """Seven classes leave three without support: their ratios are 0, not NaN."""
    labels, probabilities = _predictions()
    labels %= classes
    found = evaluate(labels, probabilities)
    predicted = probabilities.argmax(axis=1)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predicted, labels=range(10), zero_division=0
    )
    assert found.n == 700
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found.loss == pytest.approx(
        reference.log_loss(labels, probabilities.astype(np.float64), labels=range(10)), rel=1e-6
    )
    assert [c.label for c in found.classes] == list(CLASS_NAMES)
    assert np.allclose([c.precision for c in found.classes], precision)
    assert np.allclose([c.recall for c in found.classes], recall)
    assert np.allclose([c.f1 for c in found.classes], f1)
    assert [c.support for c in found.classes] == support.tolist()
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision.mean(), recall.mean(), f1.mean()))
    assert np.array_equal(found.confusion, reference.confusion_matrix(labels, predicted, labels=range(10)))


def test_wilson_interval_is_the_published_one() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), interval in published.items():
        assert wilson_interval(successes, n) == pytest.approx(interval, abs=5e-5)
    low, high = wilson_interval(30, 30)
    assert low < 1 == high


def test_calibration_error_by_hand() -> None:
    """Four images, 10 bins. 0.35 and 0.38 share a bin (one right): |0.365 - 0.5| * 2/4. 0.95 right: 0.05 * 1/4.
    0.6 wrong, on a bin's closed upper edge: 0.6 * 1/4."""

    def row(first: float, place: int) -> np.ndarray:
        out = np.full(10, (1 - first) / 9)
        out[place] = first
        return out

    probabilities = np.stack([row(0.35, 0), row(0.38, 1), row(0.95, 2), row(0.6, 3)])
    labels = np.array([0, 5, 2, 7])
    assert calibration_error(labels, probabilities, bins=10) == pytest.approx(0.135 * 0.5 + 0.05 * 0.25 + 0.6 * 0.25)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    labels = np.arange(10)
    assert calibration_error(labels, np.eye(10)) == 0
    wrong = evaluate(labels, np.roll(np.eye(10), 1, axis=0))
    assert wrong.calibration_error == 1
    assert wrong.accuracy == 0
    assert wrong.loss == pytest.approx(-np.log(1e-7))  # clipped, not infinite


_LABELS, _ROWS = _predictions(20)


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        (_LABELS[:0], _ROWS[:0]),
        (_LABELS[:5], _ROWS),
        (_LABELS, _ROWS[:, :9]),
        (_LABELS[:, None], _ROWS),
        (_LABELS + 1.5, _ROWS),
        (_LABELS + 5, _ROWS),
        (_LABELS - 5, _ROWS),
        (_LABELS, np.where(np.arange(10) == 3, np.nan, _ROWS)),
        (_LABELS, np.where(np.arange(10) == 3, np.inf, _ROWS)),
        (_LABELS, _ROWS * 2),
        (_LABELS, _ROWS - np.float32(0.1)),
    ],
    ids=["empty", "lengths", "nine", "2d", "float", "above", "below", "nan", "inf", "sum", "negative"],
)
def test_what_cannot_be_measured_is_refused(labels: np.ndarray, probabilities: np.ndarray) -> None:
    with pytest.raises(InputInvalid):
        evaluate(labels, probabilities)
    with pytest.raises(InputInvalid):
        calibration_error(labels, probabilities)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_no_interval_of_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(InputInvalid):
        wilson_interval(successes, n)


def test_metrics_are_json() -> None:
    import json

    found = evaluate(*_predictions())
    assert json.loads(json.dumps(found.as_dict()))["classes"][3]["label"] == "cat"
    assert set(found.scalars()) >= {"n", "accuracy", "loss", "precision", "recall", "f1", "calibration_error"}
    assert "classes" not in found.scalars()


def test_the_reliability_is_scikit_learns_and_adds_up_to_the_calibration_error() -> None:
    labels, probabilities = _predictions()
    found = reliability(labels, probabilities)
    confidence = probabilities.max(axis=1)
    accuracy, mean = calibration_curve(probabilities.argmax(axis=1) == labels, confidence, n_bins=15)
    np.testing.assert_allclose([each.accuracy for each in found], accuracy)
    np.testing.assert_allclose([each.confidence for each in found], mean, rtol=1e-6)
    for each in found:
        assert each.n == ((confidence > each.low) & (confidence <= each.high)).sum()
        assert (each.accuracy_low, each.accuracy_high) == wilson_interval(round(each.accuracy * each.n), each.n)
    gaps = sum(each.n * abs(each.confidence - each.accuracy) for each in found) / len(labels)
    assert gaps == pytest.approx(calibration_error(labels, probabilities))
