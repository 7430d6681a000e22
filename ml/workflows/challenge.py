"""Sets what traffic a version gets as the challenger, before it may be promoted.

Decides which version may get any. The servers see it at their next look at the registry, and act by it.
"""

import logging
from datetime import UTC, datetime

from ml.errors import ConfigurationError, ModelNotFound, RegistryError
from ml.registry import traffic as registered
from ml.registry.versions import CHALLENGER, CHAMPION, TAG_REASON, ModelVersion, Registry
from ml.settings import Settings
from ml.traffic import Mode, Traffic

logger = logging.getLogger(__name__)


def challenge(
    settings: Settings,
    version: int | None = None,
    *,
    mode: Mode | None = None,
    share: float | None = None,
    unjudged: bool = False,
) -> dict[str, object]:
    """Points `challenger` at a version and sends it traffic; without a mode it says what is set.

    Args:
        settings: where the registry is.
        version: which one; None: the one that bears the alias.
        mode: `mirror` or `canary`, see `ml.traffic`; None changes nothing.
        share: of the requests, above 0 and at most 1; goes with a mode.
        unjudged: let a version answer that the gate has not judged yet.

    Returns:
        {"version": int, "mode": str, "share": float, "since": ISO time in UTC}; None under each where nothing is set.

    Raises:
        ConfigurationError: the arguments do not go together; nothing has changed.
        ModelNotFound: there is no such version, or no challenger; nothing has changed.
        RegistryError: this version may not get that traffic; nothing has changed.
        RegistryUnavailable: could not ask. Traffic is set last: where that is missing, it is as it was before.
    """
    if mode is None or share is None:
        if version is not None or mode is not None or share is not None:
            raise ConfigurationError(
                "A challenger needs a mode and a share of the traffic.",
                fix="say --mirror SHARE or --canary SHARE; to see what is set, leave the version out.",
            )
        return shown(registered.read(Registry(settings.tracking_uri)))
    if not 0 < share <= 1:
        raise ConfigurationError(f"{share:g} is no share of the requests.", fix="give a number above 0 and at most 1.")
    registry = Registry(settings.tracking_uri)
    challenger = _wanted(registry, version)
    _check(registry, challenger, mode, unjudged=unjudged)
    registry.set_alias(CHALLENGER, challenger.version)
    traffic = Traffic(challenger.version, mode, share, since=datetime.now(UTC))
    registered.write(registry, traffic)
    logger.info("Version %d gets %g of the requests as the challenger (%s).", traffic.version, share, mode)
    return shown(traffic)


def end_challenge(settings: Settings) -> dict[str, object]:
    """Takes the challenger's traffic away; the alias stays. No harm where none is set. Returns as `challenge`.

    Raises:
        RegistryUnavailable: could not ask.
    """
    registered.clear(Registry(settings.tracking_uri))
    logger.info("The challenger gets no traffic.")
    return shown(None)


def shown(traffic: Traffic | None) -> dict[str, object]:
    """What is set, JSON-able; see `challenge`."""
    if traffic is None:
        return {"version": None, "mode": None, "share": None, "since": None}
    return {
        "version": traffic.version,
        "mode": traffic.mode,
        "share": traffic.share,
        "since": traffic.since.isoformat(),
    }


def _wanted(registry: Registry, version: int | None) -> ModelVersion:
    if version is not None:
        return registry.by_version(version)
    challenger = registry.by_alias(CHALLENGER)
    if challenger is None:
        raise ModelNotFound(
            f"No version of {registry.name} bears the alias {CHALLENGER}.",
            fix="name a version, or train one: `cifar10 train baseline`.",
        )
    return challenger


def _check(registry: Registry, challenger: ModelVersion, mode: Mode, *, unjudged: bool) -> None:
    """Raises RegistryError where the version may not get that traffic."""
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        raise RegistryError(
            f"{registry.name} has no champion, so no traffic to share.", fix="promote one: `cifar10 promote`."
        )
    if champion.version == challenger.version:
        raise RegistryError(
            f"Version {challenger.version} is the champion: it answers already.", fix="name another version."
        )
    if challenger.decision == "refused":
        why = challenger.tags.get(TAG_REASON, "")
        raise RegistryError(
            f"The gate refused version {challenger.version}{': ' + why if why else '.'}",
            fix="name a version that it did not refuse, or train another one.",
        )
    if mode == "canary" and challenger.decision != "promoted" and not unjudged:
        raise RegistryError(
            f"The gate has not judged version {challenger.version}, and as a canary it would answer callers.",
            fix="mirror it first (--mirror), judge it (`cifar10 promote`), or say --unjudged.",
        )
