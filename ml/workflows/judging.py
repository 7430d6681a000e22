"""Measures candidates and champion on the same test images and asks the gate. Moves nothing and writes nothing.

Everything is measured through ONNX Runtime, from the registry's own files: each version in the form in which it serves
or, of a candidate, would serve. That is chosen first, and whatever follows is of that form. The bounds are the
policy's, the decision is `ml.evaluation.gate`'s; carrying it out is `ml.workflows.promote`'s.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from ml.errors import InputInvalid, ModelInvalid, ModelNotFound
from ml.evaluation.comparison import Comparison, compare
from ml.evaluation.engine_choice import EngineChoice, EngineName
from ml.evaluation.gate import Champion, Check, Contender, Decision, absolute_checks, decide
from ml.evaluation.gate_policy import GatePolicy
from ml.evaluation.gate_report import GateReport
from ml.evaluation.measurement import Measurement
from ml.registry.versions import Form, ModelVersion, Registry, form_of
from ml.settings import Settings
from ml.workflows.engines import choose
from ml.workflows.exam import Exam, measure_version

logger = logging.getLogger(__name__)

Inspect = Callable[[Settings, int, EngineName], Sequence[Check]]
"""The mechanical checks of a version: `ml.workflows.inspect_version.inspect_in_fresh_process`."""


@dataclass(frozen=True)
class Judgement:
    """What the gate decided, and a report for each version that it judged."""

    decision: Decision
    reports: tuple[GateReport, ...]

    def report_of(self, version: int) -> GateReport:
        """The report on one of the versions."""
        return next(item for item in self.reports if item.candidate.version == version)

    def only(self, version: int) -> "Judgement":
        """The same decision, with the report on one version alone."""
        return Judgement(self.decision, (self.report_of(version),))

    def amended(self, decision: Decision) -> "Judgement":
        """The same figures under another decision on the same versions."""
        verdicts = {item.version: item for item in decision.verdicts}
        reports = tuple(replace(item, verdict=verdicts[item.candidate.version]) for item in self.reports)
        return Judgement(decision, reports)


def judge(
    registry: Registry,
    settings: Settings,
    policy: GatePolicy,
    *,
    exam: Exam,
    candidates: Sequence[ModelVersion],
    champion: ModelVersion | None,
    new_lineage: bool,
    inspect: Inspect,
) -> Judgement:
    """Measures, compares and decides.

    Args:
        registry: where the versions' files are.
        settings: for `inspect`, and where fetched files are kept.
        policy: the bounds.
        exam: test images of the candidates' dataset.
        candidates: one or more, of one dataset.
        champion: the version that serves; measured only where it is of that dataset.
        new_lineage: see `ml.evaluation.gate.decide`.
        inspect: gives a candidate's mechanical checks.

    Raises:
        RegistryUnavailable, StorageError: could not ask; says nothing of any version.
    """
    dataset_id = candidates[0].dataset_id
    rival, rivals_figures = None, None
    if champion is not None:
        error = None
        if champion.dataset_id == dataset_id:
            rivals_figures, error = _measured(registry, settings, champion, exam)
        rival = Champion(champion.version, champion.architecture, champion.dataset_id, error)
    contenders: dict[int, Contender] = {}
    engines: dict[int, EngineChoice] = {}
    figures: dict[int, Measurement | None] = {}
    for item in candidates:
        choice, known = choose(registry, settings, policy.int8, item, exam)
        engines[item.version] = choice
        logger.info("Version %d (%s): inspecting it in a process of its own", item.version, item.architecture)
        mechanical = tuple(inspect(settings, item.version, choice.engine))
        failed = [check.name for check in mechanical if not check.holds]
        logger.info("Version %d: %s", item.version, f"fails {', '.join(failed)}" if failed else "in order")
        found, error = _measured(registry, settings, item, exam, form=form_of(choice.engine), known=known)
        figures[item.version] = found
        contenders[item.version] = Contender(
            version=item.version,
            architecture=item.architecture,
            dataset_id=item.dataset_id,
            validation_accuracy=item.validation_accuracy,
            checks=mechanical + (absolute_checks(found, policy) if found else ()),
            comparison=_compared(found, rivals_figures, rival, policy),
            error=error,
        )
    decision = decide(list(contenders.values()), rival, policy, new_lineage=new_lineage)
    logger.info("%s", decision.reason)
    at = datetime.now(UTC)
    verdicts = {item.version: item for item in decision.verdicts}
    return Judgement(
        decision,
        tuple(
            GateReport(
                at=at,
                dataset_id=dataset_id,
                data=item.data,
                weights=item.weights,
                candidate=contenders[item.version],
                verdict=verdicts[item.version],
                champion=rival,
                measured=figures[item.version],
                champion_measured=rivals_figures,
                policy=policy,
                engine=engines[item.version],
            )
            for item in candidates
        ),
    )


def _compared(
    mine: Measurement | None, theirs: Measurement | None, rival: Champion | None, policy: GatePolicy
) -> Comparison | None:
    if mine is None or theirs is None or rival is None:
        return None
    corrupted = None
    if mine.robustness is not None and theirs.robustness is not None:
        corrupted = (mine.robustness.accuracy_per_image, theirs.robustness.accuracy_per_image)
    return compare(
        mine.labels,
        mine.probabilities,
        theirs.probabilities,
        version=rival.version,
        level=policy.champion.level,
        power=policy.champion.power,
        class_margin=policy.champion.class_margin,
        corrupted=corrupted,
    )


def _measured(
    registry: Registry,
    settings: Settings,
    version: ModelVersion,
    exam: Exam,
    *,
    form: Form | None = None,
    known: np.ndarray | None = None,
) -> tuple[Measurement | None, str | None]:
    """The figures, or why there are none."""
    try:
        return measure_version(registry, settings, version, exam, form=form, known=known), None
    except (ModelInvalid, ModelNotFound, InputInvalid) as failure:
        # InputInvalid: what it answers are no probabilities.
        logger.warning("Version %d cannot be measured: %s", version.version, failure)
        return None, failure.message
