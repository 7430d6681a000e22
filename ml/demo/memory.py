"""How much memory the stack takes, sampled beside the demo."""

import threading
from contextlib import suppress

import psutil

from ml.settings import Settings
from ml.stack.local import processes

EVERY_S = 3.0


class PeakMemory:
    """Samples the stack's memory until the block ends; `megabytes` is the highest sum seen.

    Proportional set size where the platform tells it (Linux), so that shared pages count once; else resident size.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.megabytes = 0.0

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(EVERY_S):
            total = 0
            for process in processes(self._settings):
                with suppress(psutil.Error):
                    info = process.memory_full_info()
                    total += getattr(info, "pss", info.rss)
            self.megabytes = max(self.megabytes, total / 2**20)
