"""Token buckets: never more than promised, and never for ever nothing."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from deploy.server.rate_limit import SECOND, RateLimiter

RATES = st.floats(0.01, 1e6)
STEPS = st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(0, 200)), max_size=40)


class Clock:
    def __init__(self, now=0):
        self.now = now

    def __call__(self):
        return self.now


@given(RATES, STEPS, st.integers(1, 128))
def test_within_any_time_at_most_the_burst_and_the_rate_are_admitted(rate, steps, smallest):
    clock = Clock(now=7 * SECOND)
    limiter = RateLimiter(smallest, clock)
    admitted = []
    for wait, images in steps:
        clock.now += wait
        if limiter.take("a", images, rate) == 0:
            admitted.append((clock.now, images))
    for first, last in itertools.combinations_with_replacement(range(len(admitted)), 2):
        seconds = (admitted[last][0] - admitted[first][0]) / SECOND
        taken = sum(images for _, images in admitted[first : last + 1])
        assert taken <= limiter.burst(rate) + rate * seconds * (1 + 1e-12)


@given(st.floats(0.01, 50), st.integers(0, 2 * SECOND), st.integers(101, 128))
def test_whoever_waits_as_told_is_admitted_and_a_second_less_is_too_early(rate, waited, images):
    clock = Clock()
    limiter = RateLimiter(128, clock)
    assert limiter.take("a", 128, rate) == 0
    clock.now += waited
    seconds = limiter.take("a", images, rate)
    assert seconds == limiter.wait("a", images, rate) > 0
    clock.now += (seconds - 1) * SECOND
    assert limiter.take("a", images, rate) > 0
    clock.now += SECOND
    assert limiter.take("a", images, rate) == 0


@given(RATES, st.integers(1, 200))
def test_a_clock_that_stands_still_does_not_admit_for_ever(rate, images):
    limiter = RateLimiter(128, Clock())
    admitted = 0
    while limiter.take("a", 1, rate) == 0 and admitted < 300:
        admitted += 1
    assert admitted == min(limiter.burst(rate), 300)
    if admitted < 300:
        assert limiter.take("a", images, rate) > 0


@given(RATES)
def test_a_bucket_refills_to_its_burst_and_no_further(rate):
    clock = Clock()
    limiter = RateLimiter(128, clock)
    burst = limiter.burst(rate)
    assert limiter.take("a", burst, rate) == 0
    assert limiter.take("a", 1, rate) > 0
    clock.now += 10 * (int(burst / rate) + 1) * SECOND
    assert limiter.take("a", burst + 1, rate) > 0
    assert limiter.take("a", burst, rate) == 0


def test_every_request_that_is_small_enough_passes_and_two_seconds_worth_at_once():
    limiter = RateLimiter(128, Clock())
    assert [limiter.burst(rate) for rate in (0.1, 64, 65, 1000)] == [128, 128, 130, 2000]
    assert limiter.take("slow", 128, 0.1) == 0


def test_callers_have_buckets_of_their_own_and_what_was_refused_costs_nothing():
    limiter = RateLimiter(2, Clock())
    assert limiter.take("a", 2, 1) == 0
    assert limiter.take("a", 3, 1) == limiter.take("a", 3, 1) == 3
    assert limiter.take("b", 2, 1) == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, SECOND)), max_size=300))
def test_memory_is_bounded_and_callers_who_went_are_forgotten(calls):
    clock = Clock()
    limiter = RateLimiter(1, clock, max_callers=20)
    for caller, wait in calls:
        clock.now += wait
        limiter.take(str(caller), 1, 1)
        assert len(limiter) <= 20
    clock.now += 3600 * SECOND
    for _ in range(30):
        limiter.take("last", 1, 1)
        clock.now += 10 * SECOND
    assert len(limiter) == 1
