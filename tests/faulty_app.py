"""The server as it is deployed, with short deadlines and a clock that jumps.

`deploy.server.__main__.listen` serves `tests.faulty_app:serve`.
"""

import itertools
import time
from datetime import datetime, timedelta, tzinfo
from typing import Any

from deploy.server.bridge import Bridge

BODY_SECONDS = 1.0
JUMPS = (timedelta(0), timedelta(days=3650), timedelta(days=-3650))
"""Where the clock stands from question to question, against the real one."""

_jumps = itertools.cycle(JUMPS)
_time = time.time


class Jumping(datetime):
    """Its `now` is another every time."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Any:
        return datetime.now(tz) + next(_jumps)


def serve() -> Bridge:
    from deploy.server import predictions, wsgi

    predictions.datetime = Jumping  # type: ignore[misc]
    time.time = lambda: _time() + next(_jumps).total_seconds()
    return wsgi.bridge(body_seconds=BODY_SECONDS)
