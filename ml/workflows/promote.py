"""Promotion: has the candidates judged and carries the gate's decision out.

Measuring and deciding is `ml.workflows.judging`'s, moving the two aliases as one is `ml.registry.aliases`'s. Here: the
order of things, so that a crash or an outage at any point leaves a state from which running it again ends right, and a
lock, so that two promotions never judge at once. Back again is `ml.workflows.rollback`'s.

What a promotion does, in order: finish a move that an earlier one left half-done; collect the candidates; measure
everything on the same test images, each candidate in the form (float32 or int8) in which it would serve; decide;
publish a report on each version that was judged; write that form, reason and figures on it; move `previous`, then
`champion`. Where it is to wait for mirrored requests, the lock is given back for that time (a rollback must not have to
wait), and nothing is moved if champion or candidate are others afterwards.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ml.evaluation import gate
from ml.evaluation.gate import postponed, shadow_checks
from ml.evaluation.gate_policy import load_policy
from ml.evaluation.gate_report import GateReport, as_html, as_json
from ml.monitoring.shadow_log import Shadow
from ml.registry import aliases, traffic
from ml.registry.versions import (
    CHAMPION,
    FP32,
    PENDING,
    TAG_DECISION,
    TAG_ENGINE,
    TAG_ENGINE_REASON,
    TAG_REASON,
    ModelVersion,
    Registry,
)
from ml.settings import Settings
from ml.workflows import shadowing
from ml.workflows.exam import load_exam
from ml.workflows.inspect_version import inspect_in_fresh_process
from ml.workflows.judging import Inspect, Judgement, judge
from ml.workflows.promotion_lock import LOCK_WAIT_SECONDS, alone
from ml.workflows.verdicts import (
    TAG_N,
    TAG_REPORT,
    TAG_TEST_ACCURACY,
    TAG_TEST_LOSS,
    TAG_TEST_PRECISION,
    TAG_TEST_RECALL,
    standing,
    verdict,
)

logger = logging.getLogger(__name__)

SHADOW_WAIT_SECONDS = 1800.0


def promote(
    settings: Settings,
    dataset_id: str | None = None,
    test_limit: int | None = None,
    new_lineage: bool = False,
    after_shadow: int | None = None,
    *,
    shadow_wait_seconds: float = SHADOW_WAIT_SECONDS,
    lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    inspect: Inspect = inspect_in_fresh_process,
) -> dict[str, object]:
    """Judges the versions that wait for a verdict and, where the gate says so, makes one of them champion.

    Safe to repeat: where nothing waits, nothing changes and the answer says so.

    Args:
        settings: where registry, datasets, database and the gate's policy are.
        dataset_id: judge the candidates of this dataset; None: of the newest candidate's, which is logged.
        test_limit: measure on at most so many test images (a seeded, stratified choice); None: on all.
        new_lineage: let a candidate succeed a champion that was trained on another dataset.
        after_shadow: move the alias only after so many images of live requests were mirrored to the winner and it did
            well on them. Where there is no champion nobody's requests could be mirrored, and nothing is waited for.
        shadow_wait_seconds: for how long to wait for them. When it is over, the winner stays a candidate and is
            mirrored on: the next call goes on counting.
        lock_wait_seconds: how long to wait for a promotion that is under way.
        inspect: gives a candidate's mechanical checks.

    Returns:
        {"promoted": bool, "reason": str, "dataset_id", "champion": {"name", "version", "architecture",
        "test_accuracy"} | None, "previous": likewise | None, "candidates": a `verdict_of` for each version that this
        call judged, "reports": for each of them what `ml.evaluation.gate_report.as_json` gives, "n": test images}.
        After a call that was cut off, ask `verdict_of` for what became of a version: the repetition finds nothing left
        to judge.

    Raises:
        RegistryUnavailable, DatabaseUnavailable: could not ask; whatever was begun is finished by the next call.
        DatasetNotFound, DatasetInvalid, StorageError: the test images cannot be read; nothing has changed.
        RegistryError: another promotion held the lock for all of `lock_wait_seconds`.
        ConfigurationError: the policy cannot be used, or mirrored images are wanted and no database is set.
    """
    policy = load_policy(settings.gate_policy)
    if after_shadow is not None:
        _ = settings.database_url  # refused before anything is judged
    with alone(settings, lock_wait_seconds) as still_alone:
        registry = Registry(settings.tracking_uri)
        finished = aliases.finish(registry)
        if finished is not None:
            shadowing.end(registry, finished.champion)
        waiting = registry.versions(decision=PENDING)
        if dataset_id is None and waiting:
            dataset_id = waiting[0].dataset_id
            logger.info("No dataset given: judging candidates of %s, the newest candidate's", dataset_id)
        candidates = [item for item in waiting if item.dataset_id == dataset_id]
        champion = registry.by_alias(CHAMPION)
        if not candidates:
            return _nothing_to_judge(settings, registry, dataset_id, finished)

        exam = load_exam(settings, str(dataset_id), test_limit, policy.absolute.corrupted_images)
        judgement = judge(
            registry,
            settings,
            policy,
            exam=exam,
            candidates=candidates,
            champion=champion,
            new_lineage=new_lineage,
            inspect=inspect,
        )
        still_alone()
        winner, mirroring = judgement.decision.promoted, None
        if after_shadow is not None and champion is not None and winner is not None:
            _serve_as(registry, judgement.report_of(winner))
            since = shadowing.begin(registry, winner)
            mirroring = shadowing.Mirroring(champion.version, winner, since, after_shadow, shadow_wait_seconds)
            waits = postponed(judgement.decision, _waits(mirroring, 0))
            _carry_out(registry, judgement.amended(waits), champion)
        else:
            _carry_out(registry, judgement, champion)
    if mirroring is not None and champion is not None:
        seen = shadowing.wait(settings, mirroring)
        with alone(settings, lock_wait_seconds) as still_alone:
            overtaken = _overtaken(registry, mirroring)
            judgement = judgement.amended(_with_shadow(judgement, mirroring, seen, overtaken))
            logger.info("%s", judgement.decision.reason)
            still_alone()
            if not overtaken:
                _carry_out(registry, judgement.only(mirroring.challenger), champion)
    return {
        "promoted": judgement.decision.promoted is not None,
        "reason": judgement.decision.reason,
        "dataset_id": dataset_id,
        **standing(registry, _champions_accuracy(judgement)),
        "candidates": [verdict(settings, registry, registry.by_version(item.version)) for item in candidates],
        "reports": [as_json(report) for report in judgement.reports],
        "n": len(exam.clean.labels),
    }


def _waits(mirroring: shadowing.Mirroring, seen: int) -> str:
    return f"version {mirroring.challenger} has seen {seen} of {mirroring.images} mirrored images and waits for more."


def _with_shadow(
    judgement: Judgement, mirroring: shadowing.Mirroring, seen: Shadow, overtaken: str | None
) -> gate.Decision:
    """What becomes of the decision after the wait."""
    if overtaken:
        return postponed(judgement.decision, overtaken)
    if seen.n < mirroring.images:
        return postponed(judgement.decision, _waits(mirroring, seen.n))
    winner = judgement.report_of(mirroring.challenger)
    checks = shadow_checks(shadowing.summary(seen), winner.candidate.comparison, winner.policy)
    return gate.after_shadow(judgement.decision, checks)


def _serve_as(registry: Registry, report: GateReport) -> None:
    """Writes down in which form the winner serves before it is shown any request; what its other form saw is void."""
    version = registry.by_version(report.candidate.version)
    if version.tags.get(TAG_ENGINE, FP32.engine) != report.engine.engine:
        shadowing.end(registry, version.version)
        registry.set_tags(version.version, _engine_tags(report))


def _overtaken(registry: Registry, mirroring: shadowing.Mirroring) -> str | None:
    """Why what was decided before the wait no longer holds; None where it does."""
    champion = registry.by_alias(CHAMPION)
    if champion is None or champion.version != mirroring.champion:
        return f"the champion is no longer version {mirroring.champion}, with which it was compared: promote again."
    if registry.by_version(mirroring.challenger).decision != PENDING:
        return f"version {mirroring.challenger} was judged elsewhere meanwhile."
    under_way = traffic.read(registry)
    if under_way is None or under_way.version != mirroring.challenger:
        return f"the mirroring to version {mirroring.challenger} was ended by somebody: promote again."
    return None


def _carry_out(registry: Registry, judgement: Judgement, champion: ModelVersion | None) -> None:
    """Publishes the reports, writes the evidence, moves the aliases where there is a winner."""
    promoted = judgement.decision.promoted
    tags: dict[int, Mapping[str, str]] = {}
    for report in judgement.reports:
        version = report.candidate.version
        tags[version] = _evidence(report, _publish(registry, report))
        # The winner's evidence is part of the move: until that is written down, the winner stays a candidate.
        if version != promoted:
            registry.set_tags(version, tags[version])
            if report.verdict.outcome == "refused":
                shadowing.end(registry, version)
    if promoted is None:
        return
    before = None if champion is None else champion.version
    aliases.carry_out(registry, aliases.Move(promoted, before, before, {promoted: tags[promoted]}))
    # Last: were it ended before the move and that cut short, what was mirrored so far would count for nothing.
    shadowing.end(registry, promoted)


def _publish(registry: Registry, report: GateReport) -> str:
    """Puts a report beside the version's files; returns its path there.

    A path of its own for each judgement: while the tags name an earlier one, that one must stand.
    """
    under = f"gate/{report.at:%Y%m%dT%H%M%S.%fZ}-{report.verdict.outcome}"
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        (Path(folder) / "report.html").write_text(as_html(report), encoding="utf-8")
        (Path(folder) / "report.json").write_text(json.dumps(as_json(report), indent=2), encoding="utf-8")
        registry.attach(registry.by_version(report.candidate.version), Path(folder), under)
    return f"{under}/report.html"


def _evidence(report: GateReport, path: str) -> dict[str, str]:
    """The tags that say what the gate made of a version, in the order in which they are to be written."""
    tags = _engine_tags(report)
    tags |= {TAG_REASON: report.verdict.reason, "gate.at": report.at.isoformat(timespec="seconds"), TAG_REPORT: path}
    if report.champion is not None and report.champion.dataset_id == report.dataset_id:
        tags["gate.against"] = str(report.champion.version)
    # Written without a measurement too: figures of an earlier look must not stand beside this reason.
    found = report.measured.metrics if report.measured else None
    tags |= {
        TAG_N: str(found.n if found else 0),
        TAG_TEST_ACCURACY: repr(found.accuracy if found else math.nan),
        TAG_TEST_PRECISION: repr(found.precision if found else math.nan),
        TAG_TEST_RECALL: repr(found.recall if found else math.nan),
        TAG_TEST_LOSS: repr(found.loss if found else math.nan),
    }
    # Last: while this says pending, the version is a candidate, and the rest is written again.
    return tags | {TAG_DECISION: report.verdict.outcome}


def _engine_tags(report: GateReport) -> dict[str, str]:
    return {TAG_ENGINE_REASON: report.engine.reason, TAG_ENGINE: report.engine.engine}


def _nothing_to_judge(
    settings: Settings, registry: Registry, dataset_id: str | None, finished: aliases.Move | None
) -> dict[str, object]:
    of_dataset = f" of dataset {dataset_id}" if dataset_id else ""
    reason = f"Nothing to judge: no version{of_dataset} waits for a verdict."
    promoted = finished is not None and TAG_DECISION in finished.evidence.get(finished.champion, {})
    candidates = []
    if finished is not None and promoted:
        candidates = [verdict(settings, registry, registry.by_version(finished.champion))]
        why = candidates[0]["reason"]
        reason = f"Finished a promotion that had been interrupted: {why}"
    logger.info("%s", reason)
    return {
        "promoted": promoted,
        "reason": reason,
        "dataset_id": dataset_id,
        **standing(registry),
        "candidates": candidates,
        "reports": [],
        "n": 0,
    }


def _champions_accuracy(judgement: Judgement) -> dict[int, float]:
    """As it was just measured, by the version of the champion that was compared with."""
    return {
        report.champion.version: report.champion_measured.metrics.accuracy
        for report in judgement.reports
        if report.champion is not None and report.champion_measured is not None
    }
