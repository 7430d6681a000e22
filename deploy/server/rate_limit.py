"""Token buckets: how many images each caller may have predicted per second, and how many at once.

Kept as one whole number for each caller: the moment at which its bucket is full again (the generic cell rate
algorithm, ITU-T I.371). A bucket that is full needs no entry at all. Nanoseconds are whole numbers, so nothing is ever
admitted by rounding.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

SECOND = 1_000_000_000
BURST_SECONDS = 2
MAX_CALLERS = 10_000
"""Beyond so many at once, the one that was longest silent starts with a full bucket."""


class RateLimiter:
    """Admits at most `burst + rate * seconds` images of a caller within any so many seconds; thread-safe.

    The burst is two seconds' worth, and at least `smallest_burst`, so that every request that is small enough to be
    answered at all passes after some waiting.
    """

    def __init__(self, smallest_burst: int, clock: Callable[[], int], *, max_callers: int = MAX_CALLERS) -> None:
        """`clock` gives nanoseconds and never goes back."""
        self._smallest_burst = smallest_burst
        self._clock = clock
        self._max_callers = max_callers
        self._full_at: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str, images: int, rate: float) -> int:
        """Takes `images` (0 or more) out of the caller's bucket, all or none, at `rate` images per second (over 0).

        Returns:
            0 where they were taken; else after how many whole seconds there will be enough, if nobody else takes any.
        """
        with self._lock:
            now = self._clock()
            full_at = self._full_after(caller, images, rate, now)
            seconds = self._late(full_at, rate, now)
            if seconds == 0 and images:
                self._full_at[caller] = full_at
                self._full_at.move_to_end(caller)
                self._forget(now)
            return seconds

    def wait(self, caller: str, images: int, rate: float) -> int:
        """What `take` would return; takes nothing."""
        now = self._clock()
        return self._late(self._full_after(caller, images, rate, now), rate, now)

    def _full_after(self, caller: str, images: int, rate: float, now: int) -> int:
        return max(self._full_at.get(caller, 0), now) + images * _nanoseconds(rate)

    def _late(self, full_at: int, rate: float, now: int) -> int:
        return max(0, -(-(full_at - now - self.burst(rate) * _nanoseconds(rate)) // SECOND))

    def burst(self, rate: float) -> int:
        """How many images a full bucket holds."""
        return max(int(rate * BURST_SECONDS), self._smallest_burst)

    def __len__(self) -> int:
        return len(self._full_at)

    def _forget(self, now: int) -> None:
        # From the one that is longest silent on: a few at a time, so that no request pays for many.
        for _ in range(2):
            caller, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._max_callers:
                return
            del self._full_at[caller]


def _nanoseconds(rate: float) -> int:
    """Between two images; rounded up, so that never more than the rate is admitted."""
    return max(1, -int(-SECOND // rate))
