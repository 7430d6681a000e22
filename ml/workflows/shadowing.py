"""Lets a candidate see live requests before it may answer any: mirrors them to it, and waits for so many predictions.

The server does the mirroring and keeps what came out; the bounds are the gate's.
"""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ml.evaluation.gate import ShadowSummary
from ml.monitoring.shadow_log import Shadow, read_shadow
from ml.registry import traffic
from ml.registry.versions import CHALLENGER, Registry
from ml.settings import Settings
from ml.traffic import Traffic

logger = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 1.0
_SPEAK_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class Mirroring:
    """For how many mirrored images of whom, and for how long."""

    champion: int
    challenger: int
    since: datetime
    images: int
    seconds: float


def begin(registry: Registry, version: int) -> datetime:
    """Has every request mirrored to `version`; returns since when. What is mirrored to it already goes on."""
    under_way = traffic.read(registry)
    registry.set_alias(CHALLENGER, version)
    if under_way is not None and (under_way.version, under_way.mode) == (version, "mirror"):
        return under_way.since
    now = datetime.now(UTC)
    traffic.write(registry, Traffic(version, "mirror", 1.0, now))
    return now


def end(registry: Registry, version: int) -> None:
    """Ends whatever traffic is set for `version`; another's goes on."""
    under_way = traffic.read(registry)
    if under_way is not None and under_way.version == version:
        traffic.clear(registry)


def wait(settings: Settings, what: Mirroring) -> Shadow:
    """The first `what.images` mirrored images, or, when the time is over, as many as there are.

    Raises:
        DatabaseUnavailable: PostgreSQL could not be asked.
    """
    deadline, spoken = time.monotonic() + what.seconds, -_SPEAK_EVERY_SECONDS
    while True:
        seen = read_shadow(settings.database_url, what.champion, what.challenger, what.since, limit=what.images)
        now = time.monotonic()
        if seen.n >= what.images or now >= deadline:
            return seen
        if now - spoken >= _SPEAK_EVERY_SECONDS:
            spoken = now
            logger.info(
                "Version %d has seen %d of %d mirrored images; %.0f s left",
                *(what.challenger, seen.n, what.images, deadline - now),
            )
        time.sleep(_LOOK_EVERY_SECONDS)


def summary(seen: Shadow) -> ShadowSummary:
    """What the gate bounds; `seen.n` is at least 1."""

    def p95(milliseconds: np.ndarray) -> float:
        return float(np.percentile(milliseconds, 95)) if len(milliseconds) else float("nan")

    return ShadowSummary(seen.n, seen.disagreements, seen.failures, p95(seen.challenger_ms), p95(seen.champion_ms))
