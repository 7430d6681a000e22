"""Tests and intervals for two models on the same images, and for many hypotheses at once. Pure functions of counts.

Only the images that one model has right and the other wrong say which is better. What they say is `mcnemar`'s, how much
better is `difference_interval`'s, what could not have been seen at all is `smallest_seen`'s.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from ml.errors import InputInvalid

RESAMPLES = 10_000
_SEED = 20


@dataclass(frozen=True, slots=True)
class Paired:
    """Of `n` images: how many the candidate alone has right, and how many the champion alone.

    Raises:
        InputInvalid: no image, a negative count, or more of them than images.
    """

    n: int
    gained: int
    lost: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.gained < 0 or self.lost < 0 or self.gained + self.lost > self.n:
            raise InputInvalid(
                f"{self.gained} images gained and {self.lost} lost of {self.n}.",
                fix="give counts of 0 or more, together at most n, and n of 1 or more.",
            )

    @property
    def difference(self) -> float:
        """The candidate's accuracy less the champion's, in -1..1."""
        return (self.gained - self.lost) / self.n

    @property
    def disagreement(self) -> float:
        """Share of the images that one has right and the other wrong."""
        return (self.gained + self.lost) / self.n


def mcnemar(pairs: Paired) -> float:
    """The exact two-sided p-value of "both are right equally often" (McNemar 1947, in its binomial form).

    Under it the disagreements are throws of a fair coin. 1 where there are none.
    """
    disagreements = pairs.gained + pairs.lost
    return 1.0 if disagreements == 0 else float(binomtest(pairs.gained, disagreements, 0.5).pvalue)


def fallen_by_more_than(margin: float, pairs: Paired) -> float:
    """The one-sided p-value of "the candidate is at most `margin` worse": small where it has fallen by more.

    Tango's (1998) score test of a difference of paired proportions, which holds its level where few images disagree;
    with a margin of 0 it is McNemar's without correction.

    Args:
        margin: 0 <= margin < 1, as a difference of accuracies.
        pairs: what was counted.

    Raises:
        InputInvalid: another margin.
    """
    if not 0 <= margin < 1:
        raise InputInvalid(f"A margin of {margin} is none.", fix="give 0 <= margin < 1.")
    n, b, c, least = pairs.n, pairs.gained, pairs.lost, -margin
    # The likelihood's maximum at a difference of exactly `least`: the larger root of a quadratic in P(lost).
    second = -b - c + (2 * n - b + c) * least
    third = -c * least * (1 - least)
    p_lost = (math.sqrt(max(second * second - 8 * n * third, 0.0)) - second) / (4 * n)
    variance = n * (2 * p_lost + least * (1 - least))
    if variance <= 0:  # nobody disagrees, and none was to
        return 1.0
    return float(norm.cdf((b - c - n * least) / math.sqrt(variance)))


def largest_fall(pairs: Paired, confidence: float = 0.95) -> float:
    """The upper one-sided confidence bound of how far accuracy has fallen, in 0..1: Tango's score test, inverted.

    The smallest margin at which "it has fallen by the margin or more" is refuted; 0 where even "it has fallen at all"
    is. Close to 1 it is not sought any further.

    Raises:
        InputInvalid: a confidence that is none.
    """
    if not 0 < confidence < 1:
        raise InputInvalid(f"A confidence of {confidence} is none.", fix="give 0 < confidence < 1.")

    def unrefuted(margin: float) -> float:
        # What is small where it has fallen by more has a complement, small where it has fallen by less.
        return 1 - fallen_by_more_than(margin, pairs) - (1 - confidence)

    # Where nobody disagrees, a margin of 0 leaves nothing to test.
    least, most = (0.0 if pairs.gained + pairs.lost else 1e-12), 1 - 1e-9
    if unrefuted(least) <= 0:
        return 0.0
    return most if unrefuted(most) > 0 else float(brentq(unrefuted, least, most, xtol=1e-9))


def difference_interval(pairs: Paired, confidence: float = 0.95, seed: int = _SEED) -> tuple[float, float]:
    """Percentile bootstrap interval of the difference in accuracy, resampling images (Efron & Tibshirani 1993, ch. 13).

    An image counts 1, 0 or -1, so that a resample of all images is one draw from a multinomial of three.
    """
    rest = pairs.n - pairs.gained - pairs.lost
    shares = np.array([pairs.gained, pairs.lost, rest]) / pairs.n
    counts = np.random.default_rng(seed).multinomial(pairs.n, shares, size=RESAMPLES)
    return percentiles((counts[:, 0] - counts[:, 1]) / pairs.n, confidence)


def percentiles(resampled: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The bootstrap's percentile interval: what cuts off half of the rest at either end of the resampled figures."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def student_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values, float (n,): mean ± t(n - 1) s / √n.

    Of a single value everything is possible: the interval is infinite.

    Raises:
        InputInvalid: there is none.
    """
    n = len(values)
    if n == 0:
        raise InputInvalid("A mean of nothing has no interval.", fix="give one value or more.")
    if n == 1:
        return -math.inf, math.inf
    half = float(t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return float(values.mean()) - half, float(values.mean()) + half


def smallest_seen(n: int, disagreement: float, level: float, power: float) -> float:
    """The smallest true difference in accuracy that McNemar's test finds with this power, at this disagreement.

    Solves sqrt(n) d = z(1 - level / 2) sqrt(psi) + z(power) sqrt(psi - d^2) for d (Connor 1987, eq. 2), psi being the
    share of images that the two disagree on. No difference is larger than psi: where not even that would be found,
    the answer is psi too.

    Raises:
        InputInvalid: n < 1, or a share, level or power that is none.
    """
    if n < 1 or not 0 <= disagreement <= 1 or not 0 < level < 1 or not 0 < power < 1:
        raise InputInvalid(
            f"n={n}, disagreement={disagreement}, level={level}, power={power} cannot be.",
            fix="give n >= 1 and shares within 0..1.",
        )
    at_level, at_power = norm.isf(level / 2), norm.isf(1 - power)
    # Squared, the equation is quadratic in d.
    a = n + at_power**2
    b = -2 * math.sqrt(n) * at_level * math.sqrt(disagreement)
    c = disagreement * (at_level**2 - at_power**2)
    root = (-b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
    return min(float(root), disagreement)


def power_of(difference: float, n: int, disagreement: float, level: float) -> float:
    """The probability with which McNemar's test finds a true difference in accuracy: `smallest_seen` solved for it.

    Args:
        difference: 0 <= difference <= disagreement.
        n: images.
        disagreement: share of the images that the two disagree on.
        level: of the test, two-sided.

    Raises:
        InputInvalid: n < 1, a share or level that is none, or a difference that this disagreement does not allow.
    """
    if n < 1 or not 0 <= difference <= disagreement <= 1 or not 0 < level < 1:
        raise InputInvalid(
            f"difference={difference}, n={n}, disagreement={disagreement}, level={level} cannot be.",
            fix="give n >= 1, shares within 0..1 and a difference of at most the disagreement.",
        )
    beyond = math.sqrt(n) * difference - float(norm.isf(level / 2)) * math.sqrt(disagreement)
    spread = math.sqrt(disagreement - difference * difference)
    if spread == 0:  # every image, or none, speaks for the same model
        return 1.0 if beyond > 0 else 0.0
    return float(norm.cdf(beyond / spread))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values: rejecting those at most alpha keeps the family-wise error at most alpha.

    The i-th smallest of m becomes the running maximum of (m - i + 1) * p, at most 1. Source: Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).

    Args:
        p_values: floats (m,), 0..1, any order.

    Returns:
        Adjusted p-values (m,) in the order of `p_values`.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
