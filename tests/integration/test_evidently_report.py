"""The report that people see: our verdict and methods in it, whole files, and nothing loaded from elsewhere."""

import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest

from ml.errors import StorageError
from ml.monitoring.reference import STATISTIC_NAMES, Sample
from ml.monitoring.statistics import test_drift
from tests.conftest import wait_until


def draw(generator, n, shift=0.0):
    probabilities = generator.dirichlet(np.full(10, 0.5), n).astype(np.float32)
    statistics = {name: generator.normal(0.5, 0.1, n).astype(np.float32) for name in STATISTIC_NAMES}
    statistics["brightness"] += np.float32(shift)
    statistics["noise"] += np.float32(shift)
    return Sample(probabilities.argmax(axis=1), probabilities, statistics)


@pytest.fixture
def write(tmp_path):
    """Writes the report of one window and returns it with the test's result."""
    from ml.monitoring.evidently_report import write_report

    def _write(shift, first_id=1, spoil=None):
        generator = np.random.default_rng(5)
        reference, current = draw(generator, 2000), draw(generator, 300, shift)
        if spoil:
            current.statistics[spoil][:] = np.nan
        drift = test_drift(reference, current, 0.01)
        report = write_report(
            *(tmp_path, reference, current, drift),
            model_name="cifar10-classifier",
            model_version=7,
            ids=(first_id, first_id + 299),
            timestamp=datetime(2026, 1, 1, tzinfo=UTC),
        )
        return report, drift

    return _write


def test_the_report_says_what_the_verdict_says(write):
    report, drift = write(0.1)
    assert set(drift.drifted_columns) == {"brightness", "noise"}
    found = json.loads(report.json.read_text())
    assert found["metrics"][0]["value"] == drift.p_value
    p_values = {
        metric["config"]["column"]: metric["value"]
        for metric in found["metrics"]
        if metric["config"]["type"].endswith("ValueDrift")
    }
    ours = {column.name: column.p_value for column in drift.columns}
    assert p_values["brightness"] == pytest.approx(ours["brightness"])
    assert p_values["P(cat)"] == pytest.approx(ours["p_3"])
    assert p_values["predicted_class"] == pytest.approx(ours["predicted_class"])
    assert len(p_values) == 16
    failed = {test["name"].removeprefix("Value Drift for column ") for test in found["tests"]
              if test["status"] == "FAIL"}  # fmt: skip
    assert failed == {"brightness", "noise"}


def test_the_page_needs_no_network(write):
    html = write(0.0)[0].html.read_text()
    assert len(html) > 1_000_000  # scripts and styles are inside
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", html)


def test_the_workspace_holds_one_run_a_window(write, tmp_path):
    from evidently.ui.workspace import Workspace

    from ml.monitoring.evidently_report import PROJECT_ID

    write(0.0)
    write(0.1, first_id=301)
    again, drift = write(0.1, first_id=301)
    workspace = Workspace(str(tmp_path / "workspace"))
    assert [project.name for project in workspace.list_projects()] == ["cifar10-classifier"]
    runs = workspace.list_runs(PROJECT_ID)
    assert len(runs) == 2
    assert again.ui_path.rsplit("/", 1)[1] in map(str, runs)
    assert {tuple(workspace.get_run(PROJECT_ID, run).tags) for run in runs} == {("v7", "stable"), ("v7", "drift")}
    panels = workspace.get_dashboard(PROJECT_ID).panels
    assert panels[0].title == "Family-wise drift p-value of each window"
    known = {
        metric.metric_value_location.metric.params["type"]
        for run in runs
        for metric in workspace.get_run(PROJECT_ID, run).metric_results.values()
    }
    assert {value.metric for panel in panels for value in panel.values} <= known  # no panel stays empty
    assert drift.drifted
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no temporary file is left


def test_a_column_of_nothing_but_nan_leaves_the_rest_readable(write):
    report, drift = write(0.0, spoil="sharpness")
    assert drift.drifted_columns == ("sharpness",)
    assert "DRIFT: sharpness" in report.html.read_text()


def test_a_refusing_disk_is_a_storage_error(write, tmp_path):
    (tmp_path / "windows").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="could not be written"):
        write(0.0)


def test_a_file_system_without_hard_links_will_do(write, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    report, _ = write(0.0)
    assert report.html.exists()
    assert report.json.exists()


def test_a_ui_that_runs_already_shows_a_new_window(write, tmp_path):
    from evidently.ui.service.storage.local.base import LocalState
    from evidently.ui.service.storage.local.watcher import WorkspaceDirHandler
    from watchdog.observers import Observer

    workspace = tmp_path / "workspace"
    workspace.mkdir()
    state = LocalState.load(str(workspace), None)
    observer = Observer()
    observer.schedule(WorkspaceDirHandler(state), str(workspace), recursive=True)
    observer.start()
    try:
        for count, first_id in enumerate((1, 301), start=1):
            write(0.0, first_id=first_id)
            shown = lambda wanted=count: [len(runs) for runs in state.snapshots.values()] == [wanted]  # noqa: E731
            wait_until(shown, seconds=20, what="the window in the UI's memory")
        assert [project.name for project in state.projects.values()] == ["cifar10-classifier"]
    finally:
        observer.stop()
        observer.join()
