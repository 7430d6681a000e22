"""Judges the champion's newest predictions, tells people, and says whether a retraining is due.

Composes `ml.monitoring`. The order makes a crash harmless at any point: read, test, write the report's files (a
repeated run replaces them); then window, retraining and alerts in one transaction; then delivery. Until that
transaction nothing has happened and the next run judges the same predictions; after it they are judged for good, and
the next run delivers an alert that was not delivered and hands on a retraining that was not started. At the end
predictions that are older than they are kept are removed, which no verdict depends on.

Starting the retraining is the orchestrator's: what it starts says so with `start_retraining` and tells how it ended
with `finish_retraining`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from ml.errors import ConfigurationError, DatabaseUnavailable, ModelNotFound
from ml.monitoring import alerts, windows
from ml.monitoring.gaps import gap_message, take_untold_gaps
from ml.monitoring.performance import LivePerformance, live_performance
from ml.monitoring.policy import alert_due, verdict
from ml.monitoring.prediction_log import Window, read_window
from ml.monitoring.reference import Reference, Sample, read_reference
from ml.monitoring.statistics import DriftResult, test_drift
from ml.registry.versions import CHAMPION, Registry, served_form
from ml.settings import Settings
from ml.workflows.retain import retain

logger = logging.getLogger(__name__)

_STARTED_BY = "cifar10_monitor starts it, in its next scheduled run at the latest"
"""True of a run of that DAG, which starts what it was told is due, and of the command line, which starts nothing."""


class Champion(Protocol):
    """What is asked of a model version."""

    @property
    def name(self) -> str:
        """The registered model's name."""

    @property
    def version(self) -> int:
        """Its number."""

    @property
    def architecture(self) -> str:
        """`baseline` or `vgg16`."""

    @property
    def dataset_id(self) -> str:
        """The dataset that it was trained on; empty where it does not say."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Among them `recipe`, and `engine` where the form that serves was chosen."""


class ModelSource(Protocol):
    """What is asked of the registry; `ml.registry.versions.Registry`, or a fake in tests."""

    def by_alias(self, alias: str) -> Any:
        """The version that bears `alias`, or None where there is none."""

    def fetch(self, version: Any, cache_dir: Path, files: tuple[str, ...]) -> Path:
        """A folder with the named files under `artifacts/`."""


@dataclass(frozen=True)
class _Judged:
    """A window's row, and where its report is shown; None without a report."""

    row: windows.JudgedWindow
    report: dict[str, str | None]


def monitor(settings: Settings, min_predictions: int | None = None) -> dict[str, Any]:
    """Judges the champion's predictions since its last verdict.

    Args:
        settings: see `Settings`, "Monitoring".
        min_predictions: replaces `monitor_min_predictions`.

    Returns:
        `verdict`, `p_value` (None when insufficient), `n`, `model` {name, version}, `drifted_columns`,
        `live_accuracy` (None without labels), `accuracy_interval`, `labelled`, `estimated_accuracy`, `report` {html,
        json, url} (None when insufficient), `alert`, `retraining` {due, architecture, dataset_id, recipe, reason,
        retraining_id} and `window_id`. All of it JSON-able. A retraining is as the champion's training was; it is due
        until a trainer has called `start_retraining` with its id, so it may be handed on more than once.

    Raises:
        ModelNotFound: when there is no champion.
        ModelInvalid: when its reference cannot be used.
        ConfigurationError: when more predictions are asked for than a window may hold.
        RegistryUnavailable, DatabaseUnavailable, StorageError: nothing was judged; run it again.
    """
    return monitor_champion(settings, Registry(settings.tracking_uri), min_predictions=min_predictions)


def monitor_champion(
    settings: Settings,
    registry: ModelSource,
    *,
    min_predictions: int | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dict[str, Any]:
    """`monitor` with its registry and its clock handed in."""
    wanted = settings.monitor_min_predictions if min_predictions is None else min_predictions
    if not 2 <= wanted <= settings.monitor_max_predictions:
        raise ConfigurationError(
            f"A window of at least {wanted} predictions cannot be judged: windows hold 2 to "
            f"{settings.monitor_max_predictions}.",
            fix="set MONITOR_MIN_PREDICTIONS to 2 or more and to no more than MONITOR_MAX_PREDICTIONS.",
        )
    database_url = settings.database_url
    champion: Champion | None = registry.by_alias(CHAMPION)
    if champion is None:
        raise ModelNotFound(
            "There is no champion, so there is nothing to watch.", fix="promote a model first: `cifar10 promote`."
        )
    file = served_form(champion.tags).reference
    folder = registry.fetch(champion, settings.cache_dir, files=(file,))
    reference = read_reference(folder / "artifacts" / file)
    with windows.monitor_lock(database_url) as lock:
        window = _next_window(settings, champion)
        judged = _judge(settings, champion, reference, window, wanted=wanted, now=clock())
        with lock.writing() as cursor:
            windows.refresh_live_accuracy(cursor, champion.name, champion.version)
            window_id = windows.insert_window(cursor, judged.row)
            retraining = windows.decide_retraining(
                cursor,
                window_id=window_id,
                verdict=judged.row.verdict,
                request=windows.TrainingRequest(
                    champion.architecture, champion.dataset_id or None, champion.tags.get("recipe") or None
                ),
                cooldown=timedelta(minutes=settings.retrain_cooldown_minutes),
                now=clock(),
            )
            channels = [alerts.LOG] + ([alerts.WEBHOOK] if settings.alert_webhook_url else [])
            if alert_due(judged.row.verdict):
                windows.insert_alerts(cursor, window_id, _message(judged, champion, retraining), channels)
            for gap in take_untold_gaps(cursor):
                windows.insert_alerts(cursor, window_id, gap_message(gap), channels)
    _deliver(settings)
    _retain(settings)
    row = judged.row
    logger.info("Verdict on %s v%d: %s (%d predictions)", row.model_name, row.model_version, row.verdict, row.n)
    return {
        "verdict": row.verdict,
        "p_value": row.drift.p_value if row.drift else None,
        "n": row.n,
        "model": {"name": row.model_name, "version": row.model_version},
        "drifted_columns": list(row.drift.drifted_columns) if row.drift else [],
        "live_accuracy": row.performance.accuracy,
        "accuracy_interval": list(row.performance.interval) if row.performance.interval else None,
        "labelled": row.performance.labelled,
        "estimated_accuracy": row.performance.estimated_accuracy,
        "report": judged.report,
        "alert": alert_due(row.verdict),
        "retraining": {
            "due": retraining.decision.due,
            **asdict(retraining.request),
            "reason": _reason(retraining),
            "retraining_id": retraining.retraining_id,
        },
        "window_id": window_id,
    }


def start_retraining(settings: Settings, retraining_id: int) -> None:
    """Notes that a trainer took a retraining, so that no later run of the monitor hands it on. Idempotent.

    Raises:
        InputInvalid: when no retraining has this id.
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    windows.mark_started(settings.database_url, retraining_id)
    logger.info("Retraining %d started", retraining_id)


def finish_retraining(settings: Settings, retraining_id: int, outcome: str) -> None:
    """Notes how a retraining ended, so that the next one may start. Idempotent.

    Raises:
        InputInvalid: when no retraining has this id.
        DatabaseUnavailable: when PostgreSQL cannot be asked.
    """
    windows.close_retraining(settings.database_url, retraining_id, outcome)
    logger.info("Retraining %d ended: %s", retraining_id, outcome)


def _next_window(settings: Settings, champion: Champion) -> Window:
    """The oldest settled predictions that were not judged yet; only the lock's holder may ask."""
    url, limit = settings.database_url, settings.monitor_max_predictions
    after = windows.watermark(url, champion.name, champion.version)
    settled = windows.settled_id(url)
    read = read_window(url, champion.version, after, limit, model_name=champion.name)
    keep = read.ids <= settled
    window = Window(
        ids=read.ids[keep],
        class_ids=read.class_ids[keep],
        probabilities=read.probabilities[keep],
        statistics={name: values[keep] for name, values in read.statistics.items()},
        labels=read.labels[keep],
    )
    logger.info("%s v%d: %d predictions after id %d", champion.name, champion.version, len(window), after)
    if len(window) == limit:
        more = windows.count_after(url, champion.name, champion.version, int(window.ids[-1]))
        if more:
            logger.info("A window holds at most %d: %d newer predictions wait for the next run", limit, more)
    return window


def _judge(
    settings: Settings, champion: Champion, reference: Reference, window: Window, *, wanted: int, now: datetime
) -> _Judged:
    n = len(window)
    drift: DriftResult | None = None
    report: dict[str, str | None] = {"html": None, "json": None, "url": None}
    ids = (int(window.ids[0]), int(window.ids[-1])) if n else None
    if n >= wanted and ids is not None:
        current = Sample(window.class_ids, window.probabilities, window.statistics)
        drift = test_drift(reference, current, settings.monitor_false_alarm_rate)
        logger.info("p = %.3g over %d columns; writing the report", drift.p_value, len(drift.columns))
        from ml.monitoring.evidently_report import write_report  # noqa: PLC0415 - nine seconds, so only where it is due

        written = write_report(
            *(settings.reports_dir, reference, current, drift),
            model_name=champion.name,
            model_version=champion.version,
            ids=ids,
            timestamp=now,
        )
        url = f"{settings.reports_public_url}/{written.ui_path}"
        report = {"html": str(written.html), "json": str(written.json), "url": url}
    row = windows.JudgedWindow(
        model_name=champion.name,
        model_version=champion.version,
        ids=ids,
        n=n,
        verdict=verdict(n, wanted, drift),
        drift=drift,
        performance=live_performance(window.class_ids, window.probabilities, window.labels),
        report=report["html"],
    )
    return _Judged(row, report)


def _message(judged: _Judged, champion: Champion, retraining: windows.RecordedRetraining) -> str:
    row = judged.row
    if row.drift is None or row.ids is None:
        raise ValueError("only a window that was tested can raise an alert")
    next_step = (
        f"retraining {retraining.retraining_id} of {retraining.request.architecture} is requested "
        f"({_reason(retraining)})"
        if retraining.decision.due
        else f"no retraining now: {_reason(retraining)}"
    )
    return alerts.alert_message(
        model=f"{champion.name} v{champion.version}",
        ids=row.ids,
        drift=row.drift,
        accuracy=_accuracy(row.performance),
        report=judged.report["url"] or "",
        next_step=next_step,
    )


def _reason(retraining: windows.RecordedRetraining) -> str:
    decision = retraining.decision
    return f"{decision.reason}; {_STARTED_BY}" if decision.due else decision.reason


def _accuracy(performance: LivePerformance) -> str:
    words = []
    if performance.accuracy is not None and performance.interval is not None:
        low, high = performance.interval
        words.append(f"Accuracy on {performance.labelled} labelled: {performance.accuracy:.3f} ({low:.3f}-{high:.3f}).")
    if performance.estimated_accuracy is not None:
        words.append(f"Estimated from confidence, uncalibrated: {performance.estimated_accuracy:.3f}.")
    return " ".join(words) or "Nothing is known of its accuracy."


def _deliver(settings: Settings) -> None:
    """Delivers what is open, of earlier runs too. The verdict stands already: no failure here takes it back.

    Outside the lock, so that no other monitor waits for a slow receiver.
    """
    webhook = settings.alert_webhook_url
    address = webhook.get_secret_value() if webhook else None
    try:
        windows.deliver_alerts(settings.database_url, lambda alert: alerts.deliver(alert, webhook_url=address))
    except DatabaseUnavailable as error:
        logger.warning("Some alerts stay open until the next run: %s", error)


def _retain(settings: Settings) -> None:
    try:
        retain(settings)
    except DatabaseUnavailable as error:
        logger.warning("Old predictions stay until the next run: %s", error)
