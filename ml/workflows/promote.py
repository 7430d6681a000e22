"""Promotion and rollback: measures the candidates and the champion, asks the gate, and carries its decision out.

The decision itself is pure and lives in `ml.evaluation.gate`; moving the two aliases as one is
`ml.registry.aliases`'s. Here: the order of things, so that a crash or an outage at any point leaves a state from
which running it again ends right, and a lock, so that two promotions never judge at once.

What a promotion does, in order: finish a move that an earlier one left half-done; collect the candidates; measure
everything on the same test images (through ONNX Runtime, from the registry's own files); decide; write reason and
figures on the versions that were judged; move `previous`, then `champion`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
import psycopg2

from ml.database import connect
from ml.datasets.manifest import Split
from ml.datasets.store import load_split
from ml.errors import DatabaseUnavailable, InputInvalid, ModelInvalid, ModelNotFound, RegistryError
from ml.evaluation.gate import Contender, Decision, Measurement, Verdict, decide
from ml.evaluation.metrics import evaluate
from ml.registry import aliases
from ml.registry.packaging import VALIDATION_ACCURACY, metric_tag
from ml.registry.versions import (
    CHAMPION,
    ONNX_FILE,
    PENDING,
    PREVIOUS,
    TAG_DECISION,
    TAG_REASON,
    ModelVersion,
    Registry,
)
from ml.serving.engine import Engine
from ml.settings import Settings

logger = logging.getLogger(__name__)

LOCK_KEY = 0x_C1FA_8010
"""PostgreSQL's advisory locks are numbers; this one means: a promotion or rollback is under way."""
LOCK_WAIT_SECONDS = 900.0
TAG_ROLLBACK_REASON = "rollback.reason"
TAG_N, TAG_TEST_ACCURACY = "gate.n", "gate.test_accuracy"
TAG_TEST_PRECISION, TAG_TEST_RECALL, TAG_TEST_LOSS = "gate.test_precision", "gate.test_recall", "gate.test_loss"
_CHUNK = 1000
"""Images between two progress lines at most."""


def promote(
    settings: Settings,
    dataset_id: str | None = None,
    test_limit: int | None = None,
    new_lineage: bool = False,
    *,
    lock_wait_seconds: float = LOCK_WAIT_SECONDS,
) -> dict[str, object]:
    """Judges the versions that wait for a verdict and, where the gate says so, makes one of them champion.

    Safe to repeat: where nothing waits, nothing changes and the answer says so.

    Args:
        settings: where registry, datasets and database are.
        dataset_id: judge the candidates of this dataset; None: of the newest candidate's, which is logged.
        test_limit: measure on at most so many test images (a seeded, stratified choice); None: on all.
        new_lineage: let a candidate succeed a champion that was trained on another dataset.
        lock_wait_seconds: how long to wait for a promotion that is under way.

    Returns:
        {"promoted": bool, "reason": str, "dataset_id", "champion": {"name", "version", "architecture",
        "test_accuracy"} | None, "previous": likewise | None, "candidates": a `verdict_of` for each version that this
        call judged, "n": test images}. After a call that was cut off, ask `verdict_of` for what became of a version:
        the repetition finds nothing left to judge.

    Raises:
        RegistryUnavailable, DatabaseUnavailable: could not ask; whatever was begun is finished by the next call.
        DatasetNotFound, DatasetInvalid, StorageError: the test images cannot be read; nothing has changed.
        RegistryError: another promotion held the lock for all of `lock_wait_seconds`.
    """
    with _alone(settings, lock_wait_seconds) as still_alone:
        registry = Registry(settings.tracking_uri)
        finished = aliases.finish(registry)
        waiting = registry.versions(decision=PENDING)
        if dataset_id is None and waiting:
            dataset_id = waiting[0].dataset_id
            logger.info("No dataset given: judging candidates of %s, the newest candidate's", dataset_id)
        candidates = [item for item in waiting if item.dataset_id == dataset_id]
        champion = registry.by_alias(CHAMPION)
        if not candidates:
            return _nothing_to_judge(registry, dataset_id, finished)

        logger.info("Loading the test images of %s", dataset_id)
        split = load_split(settings.data_url, str(dataset_id), "test", limit=test_limit)
        measured = [_contender(registry, settings, item, split) for item in candidates]
        rival = None if champion is None else _contender(registry, settings, champion, split, own=str(dataset_id))
        decision = decide(measured, rival, new_lineage=new_lineage)
        logger.info("%s", decision.reason)

        still_alone()
        _carry_out(registry, decision, measured, champion)
        champions_accuracy = None if rival is None or rival.test is None else rival.test.accuracy
        return {
            "promoted": decision.promoted is not None,
            "reason": decision.reason,
            "dataset_id": dataset_id,
            **_standing(registry, {champion.version: champions_accuracy} if champion else {}),
            "candidates": [_verdict(registry.by_version(item.version)) for item in measured],
            "n": len(split.labels),
        }


def verdict_of(settings: Settings, version: int) -> dict[str, object]:
    """What the gate has made of a version so far, as it is written in the registry. Judges nothing.

    Returns:
        {"version": int, "architecture": str, "dataset_id": str, "decision": "pending" | "promoted" | "refused",
        "reason": str (empty while nobody has looked at it), "validation_accuracy": float | None,
        "test_accuracy", "precision", "recall", "loss": float | None, "n": int (test images it was measured on)}.
        A figure that was not, or could not be, measured is None. The decision is empty for a version that was not
        registered by `ml.registry.packaging`: the gate does not look at it.

    Raises:
        ModelNotFound: there is no version of that number.
        RegistryUnavailable: could not ask.
    """
    return _verdict(Registry(settings.tracking_uri).by_version(version))


def rollback(settings: Settings, *, lock_wait_seconds: float = LOCK_WAIT_SECONDS) -> dict[str, object]:
    """Makes the previous champion champion again, and the present one previous.

    Safe to repeat after an error: a rollback that was cut off is finished, and not followed by another one.

    Returns:
        {"rolled_back": True, "reason", "champion": {...}, "previous": {...}} as `promote` gives them.

    Raises:
        ModelNotFound: there is no previous champion; nothing has changed.
        RegistryUnavailable, DatabaseUnavailable, RegistryError: as for `promote`.
    """
    with _alone(settings, lock_wait_seconds) as still_alone:
        registry = Registry(settings.tracking_uri)
        finished = aliases.finish(registry)
        if finished is not None and (done := finished.evidence.get(finished.champion, {}).get(TAG_ROLLBACK_REASON)):
            # This is what was asked for; once more would bring back the version that was to go.
            logger.info("Finished a rollback that had been interrupted: %s", done)
            return {"rolled_back": True, "reason": done, **_standing(registry, {})}
        champion, previous = registry.by_alias(CHAMPION), registry.by_alias(PREVIOUS)
        if previous is None or (champion is not None and previous.version == champion.version):
            raise ModelNotFound(
                f"{registry.name} has no previous champion to go back to.",
                fix="promote a version with `cifar10 promote`; only a second champion leaves a previous one.",
            )
        left = "no champion" if champion is None else f"version {champion.version}"
        reason = f"Rolled back from {left} to version {previous.version} ({previous.architecture})."
        note = {TAG_ROLLBACK_REASON: reason, "rollback.at": _now()}
        evidence: dict[int, Mapping[str, str]] = {previous.version: note}
        if champion is not None:
            evidence[champion.version] = note
        still_alone()
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
        return {"rolled_back": True, "reason": reason, **_standing(registry, {})}


@contextmanager
def _alone(settings: Settings, wait_seconds: float) -> Iterator[Callable[[], None]]:
    """Holds the promotion lock for the block; yields a check that it is still held.

    The lock lives in the database's session: it ends with this process, however that ends.
    """
    if settings.mlops_database_url is None:
        logger.warning("No database is set (MLOPS_DATABASE_URL): nothing keeps two promotions apart.")
        yield lambda: None
        return
    connection = connect(settings.database_url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (LOCK_KEY,))
            if not cursor.fetchone()[0]:
                logger.info("Another promotion is under way: waiting for it, at most %.0f s", wait_seconds)
                cursor.execute("SET lock_timeout = %s", (max(1, int(wait_seconds * 1000)),))
                cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK_KEY,))

            def still_alone() -> None:
                try:
                    cursor.execute("SELECT 1")
                except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
                    raise _lock_lost(error) from error

            yield still_alone
    except psycopg2.errors.LockNotAvailable as error:
        raise RegistryError(
            f"Another promotion or rollback has been under way for more than {wait_seconds:.0f} s.",
            fix="see what it does (`cifar10 status`, the Airflow UI) and try again when it has ended.",
        ) from error
    except psycopg2.OperationalError as error:
        raise _lock_lost(error) from error
    finally:
        connection.close()


def _lock_lost(error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"PostgreSQL went away while it kept promotions apart: {str(error).strip()}.",
        fix="nothing was moved; see that it runs and promote again.",
    )


def _contender(
    registry: Registry, settings: Settings, version: ModelVersion, split: Split, own: str | None = None
) -> Contender:
    """What the gate needs to know of a version. `own`: measure it only if it is of this dataset."""
    test, error = None, None
    if own is None or version.dataset_id == own:
        try:
            test = _measure(registry, settings, version, split)
        except (ModelInvalid, ModelNotFound, InputInvalid) as failure:
            # InputInvalid: what it answers are no probabilities.
            error = failure.message
            logger.warning("Version %d cannot be measured: %s", version.version, failure)
    return Contender(
        version=version.version,
        architecture=version.architecture,
        dataset_id=version.dataset_id,
        validation_accuracy=version.figure(metric_tag(VALIDATION_ACCURACY)),
        test=test,
        error=error,
    )


def _measure(registry: Registry, settings: Settings, version: ModelVersion, split: Split) -> Measurement:
    folder = registry.fetch(version, settings.cache_dir, files=(ONNX_FILE,))
    engine = Engine(folder / "artifacts" / ONNX_FILE)
    n = len(split.labels)
    parts = []
    for start in range(0, n, _CHUNK):
        logger.info("Version %d (%s): %d of %d test images", version.version, version.architecture, start, n)
        parts.append(engine.predict(split.images[start : start + _CHUNK]))
    metrics = evaluate(split.labels, np.concatenate(parts))
    logger.info("Version %d: test accuracy %.4f on %d images", version.version, metrics.accuracy, n)
    return Measurement(
        n=metrics.n,
        accuracy=metrics.accuracy,
        precision=metrics.precision,
        recall=metrics.recall,
        loss=metrics.loss,
    )


def _carry_out(
    registry: Registry, decision: Decision, measured: list[Contender], champion: ModelVersion | None
) -> None:
    by_version = {item.version: item for item in measured}
    evidence = {
        verdict.version: _evidence(verdict, by_version[verdict.version], champion) for verdict in decision.verdicts
    }
    for version, tags in evidence.items():
        # The winner's evidence is part of the move: until that is written down, the winner stays a candidate.
        if version != decision.promoted:
            registry.set_tags(version, tags)
    if decision.promoted is None:
        return
    before = None if champion is None else champion.version
    move = aliases.Move(decision.promoted, before, before, {decision.promoted: evidence[decision.promoted]})
    aliases.carry_out(registry, move)


def _evidence(verdict: Verdict, contender: Contender, champion: ModelVersion | None) -> dict[str, str]:
    tags = {TAG_REASON: verdict.reason, "gate.at": _now()}
    if champion is not None and champion.dataset_id == contender.dataset_id:
        tags["gate.against"] = str(champion.version)
    # Written without a measurement too: figures of an earlier look must not stand beside this reason.
    test = contender.test or Measurement(0, math.nan, math.nan, math.nan, math.nan)
    tags |= {
        TAG_N: str(test.n),
        TAG_TEST_ACCURACY: repr(test.accuracy),
        TAG_TEST_PRECISION: repr(test.precision),
        TAG_TEST_RECALL: repr(test.recall),
        TAG_TEST_LOSS: repr(test.loss),
    }
    # Last: while this says pending, the version is a candidate, and the rest is written again.
    return tags | {TAG_DECISION: verdict.outcome}


def _nothing_to_judge(registry: Registry, dataset_id: str | None, finished: aliases.Move | None) -> dict[str, object]:
    of_dataset = f" of dataset {dataset_id}" if dataset_id else ""
    reason = f"Nothing to judge: no version{of_dataset} waits for a verdict."
    promoted = finished is not None and TAG_DECISION in finished.evidence.get(finished.champion, {})
    candidates = []
    if finished is not None and promoted:
        candidates = [_verdict(registry.by_version(finished.champion))]
        why = candidates[0]["reason"]
        reason = f"Finished a promotion that had been interrupted: {why}"
    logger.info("%s", reason)
    return {
        "promoted": promoted,
        "reason": reason,
        "dataset_id": dataset_id,
        **_standing(registry, {}),
        "candidates": candidates,
        "n": 0,
    }


def _standing(registry: Registry, measured: Mapping[int, float | None]) -> dict[str, object]:
    """Champion and previous as they stand now; accuracies just measured, else those written on the versions."""

    def describe(version: ModelVersion | None) -> dict[str, object] | None:
        if version is None:
            return None
        accuracy = measured.get(version.version)
        return {
            "name": version.name,
            "version": version.version,
            "architecture": version.architecture,
            "test_accuracy": _finite(version.figure(TAG_TEST_ACCURACY) if accuracy is None else accuracy),
        }

    return {"champion": describe(registry.by_alias(CHAMPION)), "previous": describe(registry.by_alias(PREVIOUS))}


def _verdict(version: ModelVersion) -> dict[str, object]:
    return {
        "version": version.version,
        "architecture": version.architecture,
        "dataset_id": version.dataset_id,
        "decision": version.decision,
        "reason": version.tags.get(TAG_REASON, ""),
        "validation_accuracy": _finite(version.figure(metric_tag(VALIDATION_ACCURACY))),
        "test_accuracy": _finite(version.figure(TAG_TEST_ACCURACY)),
        "precision": _finite(version.figure(TAG_TEST_PRECISION)),
        "recall": _finite(version.figure(TAG_TEST_RECALL)),
        "loss": _finite(version.figure(TAG_TEST_LOSS)),
        "n": int(version.figure(TAG_N) or 0),
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
