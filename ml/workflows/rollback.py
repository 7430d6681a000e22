"""Rollback: back to the previous champion, in one command and without anything that a promotion needs.

Imports little: whoever rolls back is in a hurry.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from ml.errors import ModelNotFound
from ml.registry import aliases, traffic
from ml.registry.versions import CHAMPION, PREVIOUS, Registry
from ml.settings import Settings
from ml.workflows.promotion_lock import LOCK_WAIT_SECONDS, alone
from ml.workflows.verdicts import standing

logger = logging.getLogger(__name__)

TAG_REASON = "rollback.reason"


def rollback(settings: Settings, *, lock_wait_seconds: float = LOCK_WAIT_SECONDS) -> dict[str, object]:
    """Makes the previous champion champion again, and the present one previous; ends canary and mirroring.

    Safe to repeat after an error: a rollback that was cut off is finished, and not followed by another one.

    Returns:
        {"rolled_back": True, "reason", "champion": {...}, "previous": {...}} as `promote` gives them.

    Raises:
        ModelNotFound: there is no previous champion; nothing has changed.
        RegistryUnavailable, DatabaseUnavailable, RegistryError: as for `promote`.
    """
    with alone(settings, lock_wait_seconds) as still_alone:
        registry = Registry(settings.tracking_uri)
        finished = aliases.finish(registry)
        if finished is not None and (done := finished.evidence.get(finished.champion, {}).get(TAG_REASON)):
            # This is what was asked for; once more would bring back the version that was to go.
            logger.info("Finished a rollback that had been interrupted: %s", done)
            return {"rolled_back": True, "reason": done, **standing(registry)}
        champion, previous = registry.by_alias(CHAMPION), registry.by_alias(PREVIOUS)
        if previous is None or (champion is not None and previous.version == champion.version):
            raise ModelNotFound(
                f"{registry.name} has no previous champion to go back to.",
                fix="promote a version with `cifar10 promote`; only a second champion leaves a previous one.",
            )
        left = "no champion" if champion is None else f"version {champion.version}"
        reason = f"Rolled back from {left} to version {previous.version} ({previous.architecture})."
        note = {TAG_REASON: reason, "rollback.at": datetime.now(UTC).isoformat(timespec="seconds")}
        evidence: dict[int, Mapping[str, str]] = {previous.version: note}
        if champion is not None:
            evidence[champion.version] = note
        still_alone()
        # First: repeated after a crash in between, a rollback must find the aliases as they were.
        traffic.clear(registry)
        aliases.carry_out(
            registry,
            aliases.Move(
                champion=previous.version,
                previous=None if champion is None else champion.version,
                before=None if champion is None else champion.version,
                evidence=evidence,
            ),
        )
        logger.info("%s", reason)
        return {"rolled_back": True, "reason": reason, **standing(registry)}
