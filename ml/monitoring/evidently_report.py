"""The window as people see it: an Evidently report, kept as HTML and JSON and shown in Evidently's own UI.

The only importer of evidently (nine seconds), so import this module where a report is made and not before. It shows
the verdict and decides nothing: Evidently's own drift methods change with the sample's size and raise false alarms,
so each column is tested by `ml.monitoring.statistics`' functions, at the level at which the verdict was made.

Files appear whole or not at all, under names made from the window: a run that is repeated replaces its own files.
"""

import json
import os
import tempfile
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.core.report import Context, Snapshot
from evidently.legacy.calculations.stattests.registry import StatTest, register_stattest
from evidently.legacy.core import ColumnType
from evidently.legacy.renderers.html_widgets import CounterData, counter
from evidently.legacy.utils import NumpyEncoder
from evidently.metrics import MeanValue, RowCount, ValueDrift
from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
from evidently.sdk.panels import line_plot_panel

from ml.datasets.labels import CLASS_NAMES
from ml.errors import StorageError
from ml.monitoring.reference import SHOWN_NAMES, Sample
from ml.monitoring.statistics import PREDICTED_CLASS, DriftResult, chi_squared_homogeneity, ks_two_sample

PROJECT_NAME = "cifar10-classifier"
PROJECT_ID = uuid.uuid5(uuid.NAMESPACE_URL, f"evidently-project:{PROJECT_NAME}")
"""Made from the name, so that two that create the project create the same one."""

CONFIDENCE = "confidence"
_NAMED_IN_VERDICT = 3


@dataclass(frozen=True)
class WindowReport:
    """Where a window's report lies: two files, and its page under the UI's address."""

    html: Path
    json: Path
    ui_path: str


def _ks(reference: pd.Series, current: pd.Series, _: ColumnType, threshold: float) -> tuple[float, bool]:
    _, p_value = ks_two_sample(reference.to_numpy(), current.to_numpy())
    return p_value, p_value <= threshold


def _chi_squared(reference: pd.Series, current: pd.Series, _: ColumnType, threshold: float) -> tuple[float, bool]:
    counts = [series.value_counts().reindex(CLASS_NAMES, fill_value=0).to_numpy() for series in (reference, current)]
    _, p_value = chi_squared_homogeneity(*counts)
    return p_value, p_value <= threshold


KS = StatTest("cifar10_ks", "two-sample Kolmogorov-Smirnov p-value", [ColumnType.Numerical])
CHI_SQUARED = StatTest("cifar10_chi_squared", "chi-squared homogeneity p-value", [ColumnType.Categorical])
register_stattest(KS, _ks)
register_stattest(CHI_SQUARED, _chi_squared)


class WindowPValue(SingleValueMetric):  # type: ignore[misc]  # evidently is not checked: untyped
    """The window's family-wise p-value, with the verdict in words; one line over time on the dashboard.

    What it shows is no parameter: Evidently would draw a line of its own for each value of one.
    """

    _drift: DriftResult | None = None

    @classmethod
    def of(cls, drift: DriftResult) -> "WindowPValue":
        """The metric that shows `drift`."""
        metric = cls(tests=[])
        object.__setattr__(metric, "_drift", drift)
        return metric


class WindowPValueCalculation(SingleValueCalculation[WindowPValue]):  # type: ignore[misc]
    """Hands on what was computed before."""

    def calculate(self, _context: Context, _current: Dataset, _reference: Dataset | None) -> Any:
        """Called by Evidently."""
        drift = self.metric._drift
        result = self.result(drift.p_value)
        named = [_shown(name) for name in drift.drifted_columns[:_NAMED_IN_VERDICT]]
        more = len(drift.drifted_columns) - len(named)
        verdict = f"DRIFT: {', '.join(named)}{f' and {more} more' if more else ''}" if drift.drifted else "stable"
        result.widget = [
            counter(
                title="Verdict",
                counters=[
                    CounterData("family-wise p-value", f"{drift.p_value:.3g}"),
                    CounterData("alarm at or below", f"{drift.alpha:g}"),
                    CounterData("predictions", f"{drift.n_current} against {drift.n_reference}"),
                    CounterData("verdict", verdict),
                ],
            )
        ]
        return result, None

    def display_name(self) -> str:
        """The metric's title."""
        return "Window's family-wise drift p-value"


def write_report(
    reports_dir: Path,
    reference: Sample,
    current: Sample,
    drift: DriftResult,
    *,
    model_name: str,
    model_version: int,
    ids: tuple[int, int],
    timestamp: datetime,
) -> WindowReport:
    """Writes a judged window's report: two files under `windows`, and a run in the Evidently workspace.

    Args:
        reports_dir: holds `windows` and `workspace`.
        reference, current: what was compared.
        drift: what was found; gives the columns' level.
        model_name, model_version, ids: name the window; the same ones replace its earlier report.
        timestamp: the window's place on the dashboard's time axis.

    Raises:
        StorageError: when the disk refuses.
    """
    name = f"v{model_version:04d}-{ids[0]:010d}-{ids[1]:010d}"
    snapshot = Report(_metrics(current, drift), include_tests=True).run(
        _dataset(current),
        _dataset(reference),
        timestamp=timestamp,
        name=f"{model_name} v{model_version}: predictions {ids[0]}-{ids[1]}",
        metadata={"model_version": str(model_version), "first_id": str(ids[0]), "last_id": str(ids[1])},
        tags=[f"v{model_version}", "drift" if drift.drifted else "stable"],
    )
    run_id = uuid.uuid5(PROJECT_ID, name)
    html, plain = (reports_dir / "windows" / f"{name}.{ending}" for ending in ("html", "json"))
    try:
        _write(html, snapshot.get_html_str(as_iframe=False), reports_dir)
        _write(plain, snapshot.json(), reports_dir)
        _add_to_workspace(reports_dir, run_id, snapshot)
    except OSError as error:
        raise StorageError(
            f"The window's report could not be written under {reports_dir}: {error}.",
            fix="make room on that disk and see that the folder can be written to, then run `cifar10 monitor` again.",
        ) from error
    return WindowReport(html=html, json=plain, ui_path=f"projects/{PROJECT_ID}/reports/{run_id}")


def _shown(column: str) -> str:
    return SHOWN_NAMES.get(column, column)


def _dataset(sample: Sample) -> Dataset:
    columns = {_shown(name): values.astype(np.float64) for name, values in sample.columns().items()}
    columns[CONFIDENCE] = sample.probabilities.max(axis=1).astype(np.float64)
    frame = pd.DataFrame(columns | {PREDICTED_CLASS: np.array(CLASS_NAMES)[sample.class_ids]})
    return Dataset.from_pandas(
        frame, DataDefinition(numerical_columns=list(columns), categorical_columns=[PREDICTED_CLASS])
    )


def _metrics(current: Sample, drift: DriftResult) -> list[Any]:
    """Verdict and volume, then each tested column; Evidently refuses columns that hold no number at all."""
    finite = {name for name, values in current.columns().items() if np.isfinite(values).any()}
    confident = [MeanValue(column=CONFIDENCE, tests=[])] if np.isfinite(current.probabilities.max(axis=1)).any() else []
    level = drift.column_level
    return [
        WindowPValue.of(drift),
        RowCount(tests=[]),  # Evidently's default test fails each window that is not as long as the reference
        ValueDrift(column=PREDICTED_CLASS, method=CHI_SQUARED.name, threshold=level),
        *confident,
        *(ValueDrift(column=_shown(name), method=KS.name, threshold=level) for name in SHOWN_NAMES if name in finite),
    ]


def _dashboard() -> DashboardModel:
    panels = [
        line_plot_panel(
            "Family-wise drift p-value of each window",
            [PanelMetric(metric=WindowPValue.__get_type__(), legend="p-value")],
            description="An alarm is raised at or below the false-alarm rate that was set.",
            size="full",
        ),
        line_plot_panel(
            "Predictions in each window", [PanelMetric(metric="RowCount", legend="predictions")], size="half"
        ),
        line_plot_panel(
            "Mean confidence",
            [PanelMetric(metric="MeanValue", metric_labels={"column": CONFIDENCE}, legend="top-class probability")],
            size="half",
        ),
    ]
    tab = DashboardTabModel(title="Windows", panels=[panel.id for panel in panels])
    return DashboardModel(tabs=[tab], panels=panels)


def _add_to_workspace(reports_dir: Path, run_id: uuid.UUID, snapshot: Snapshot) -> None:
    """What `Workspace.add_run` does, but under a name of our choice and with a file that appears whole."""
    folder = reports_dir / "workspace" / str(PROJECT_ID)
    (folder / "snapshots").mkdir(parents=True, exist_ok=True)
    if not (folder / "dashboard.json").exists():
        _write(folder / "dashboard.json", _dump(_dashboard()), reports_dir)
    if not (folder / "metadata.json").exists():
        project = ProjectModel(
            id=PROJECT_ID,
            name=PROJECT_NAME,
            description="Live predictions of the champion, window by window, against its own held-out predictions.",
        )
        _write(folder / "metadata.json", _dump(project), reports_dir)
    _write(folder / "snapshots" / f"{run_id}.json", _dump(snapshot.to_snapshot_model()), reports_dir)


def _dump(model: Any) -> str:
    return json.dumps(model.dict(), cls=NumpyEncoder)


def _write(path: Path, text: str, reports_dir: Path) -> None:
    """Writes a whole file at once, in a way that a running Evidently UI notices.

    The UI watches its workspace for names that are created, and takes no notice of a file that is renamed within it;
    one that is moved in from outside is a name created. So the text is first written beside the workspace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=reports_dir)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
