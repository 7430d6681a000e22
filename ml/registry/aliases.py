"""Moves `champion` and `previous` together, so that a crash between the two leaves nothing half-done for good.

MLflow moves one alias at a time. A move is therefore written down first, as a tag of the registered model: both
targets and the evidence that goes on the versions. Whoever comes next finishes what is written down. Who may move at
all, and one at a time, is the caller's.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ml.registry.versions import CHAMPION, PREVIOUS, Registry

logger = logging.getLogger(__name__)

MOVE_TAG = "aliases.move"


@dataclass(frozen=True)
class Move:
    """`champion` and `previous` as they will stand, `before` as champion stood, and tags to write on versions first.

    `previous` None leaves that alias as it is (a first champion has no predecessor).
    """

    champion: int
    previous: int | None
    before: int | None
    evidence: Mapping[int, Mapping[str, str]]


def carry_out(registry: Registry, move: Move) -> None:
    """Writes the move down, then the evidence, then `previous`, then `champion`, then strikes the move out.

    Raises:
        RegistryUnavailable: MLflow could not be asked; `finish` completes the move later.
    """
    content = {
        "champion": move.champion,
        "previous": move.previous,
        "before": move.before,
        "evidence": {str(version): dict(tags) for version, tags in move.evidence.items()},
    }
    registry.set_model_tag(MOVE_TAG, json.dumps(content))
    _apply(registry, move)


def finish(registry: Registry) -> Move | None:
    """Completes a move that was begun and not ended; returns it, or None where there was none to complete.

    A move whose starting point no longer holds (somebody has set `champion` by hand since) is dropped.

    Raises:
        RegistryUnavailable: MLflow could not be asked.
    """
    written = registry.model_tag(MOVE_TAG)
    if not written:
        return None
    content = json.loads(written)
    move = Move(
        champion=int(content["champion"]),
        previous=content["previous"],
        before=content["before"],
        evidence={int(version): tags for version, tags in content["evidence"].items()},
    )
    champion = registry.by_alias(CHAMPION)
    stands = None if champion is None else champion.version
    if stands not in (move.before, move.champion):
        logger.warning("A move of champion to version %d was begun and overtaken: dropped.", move.champion)
        registry.delete_model_tag(MOVE_TAG)
        return None
    logger.warning("A move of champion to version %d was begun and not ended: finishing it.", move.champion)
    _apply(registry, move)
    return move


def _apply(registry: Registry, move: Move) -> None:
    for version, tags in move.evidence.items():
        registry.set_tags(version, tags)
    if move.previous is not None:
        registry.set_alias(PREVIOUS, move.previous)
    registry.set_alias(CHAMPION, move.champion)
    registry.delete_model_tag(MOVE_TAG)
