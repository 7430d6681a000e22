"""Runs in a real MLflow: what they carry, how they end, and what an outage does to them."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from ml.errors import RegistryError, RegistryUnavailable, RunNotFound
from ml.registry import tracking
from ml.registry.versions import Registry
from tests.tiny_versions import empty_registry, register_tiny, small_dataset


class Line:
    """A TCP line to MLflow that can be cut: while it is, connections are refused and standing ones are dropped."""

    def __init__(self, uri: str) -> None:
        self._there = ("127.0.0.1", int(uri.rsplit(":", 1)[1]))
        self._open: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):  # closed by its other end
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._there)
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def here(settings, mlflow_uri):
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@pytest.fixture
def line(mlflow_uri):
    line = Line(mlflow_uri)
    yield line
    line.cut()


@pytest.fixture
def client(mlflow_uri):
    return MlflowClient(mlflow_uri, mlflow_uri)


def test_a_run_carries_what_was_done_and_with_what(here, client, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/curve.png").write_bytes(b"png")
    manifest = small_dataset(here)
    with tracking.run(here, "demo", tags={"architecture": "baseline"}, seed=7) as run:
        run.log_params(
            {"optimizer": {"name": "adam", "rate": 0.001}, "epochs": 2, "many": {str(i): i for i in range(150)}}
        )
        for epoch in range(3):
            run.log_metrics({"loss": 1.0 / (epoch + 1)}, step=epoch)
        run.log_artifact(tmp_path / "plots", "figures")
        run.log_dict({"confusion": [[1]]}, "confusion.json")
        run.log_dataset(manifest)
    stored = client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["optimizer.name"] == "adam"
    assert len(stored.data.params) == 153
    assert [point.value for point in client.get_metric_history(run.id, "loss")] == [1.0, 0.5, pytest.approx(1 / 3)]
    tags = stored.data.tags
    for key in ("git.sha", "git.dirty", "version.numpy", "version.mlflow", "hardware.cpu", "hardware.cores", "python"):
        assert tags[key]
    assert (tags["seed"], tags["architecture"], tags["dataset_id"]) == ("7", "baseline", manifest.dataset_id)
    names = {item.path for item in client.list_artifacts(run.id)}
    assert names == {"figures", "confusion.json"}
    (given,) = stored.inputs.dataset_inputs
    assert given.dataset.digest == manifest.dataset_id
    assert json.loads(given.dataset.source)["url"].endswith(manifest.dataset_id)


def test_a_failed_block_marks_its_run_and_raises_its_own_error(here, client):
    with pytest.raises(ZeroDivisionError), tracking.run(here, "fails") as run:
        1 / 0  # noqa: B018
    stored = client.get_run(run.id)
    assert stored.info.status == "FAILED"
    assert "division" in stored.data.tags["error"]


def test_an_interrupted_block_is_killed(here, client):
    with pytest.raises(KeyboardInterrupt), tracking.run(here, "stopped") as run:
        raise KeyboardInterrupt
    assert client.get_run(run.id).info.status == "KILLED"


CUT_OFF = """
import os, signal, sys
from ml.registry import tracking
from ml.settings import load_settings

with tracking.run(load_settings(mlflow_tracking_uri=sys.argv[1]), "cut off", origin=sys.argv[2]) as run:
    print(run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_whose_process_was_killed_is_ended_by_the_next_attempt(here, client):
    lost = {}
    for origin in ("dag/it's run 1", "dag/run 2"):
        command = [sys.executable, "-c", CUT_OFF, here.tracking_uri, origin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        lost[origin] = done.stdout.strip()
    with tracking.run(here, "by hand") as unnamed:
        assert {client.get_run(run_id).info.status for run_id in lost.values()} == {"RUNNING"}
        with tracking.run(here, "again", origin="dag/it's run 1") as again:
            assert client.get_run(again.id).data.tags["origin"] == "dag/it's run 1"
            ended = client.get_run(lost["dag/it's run 1"])
            assert ended.info.status == "KILLED"
            assert ended.info.end_time
            assert "another attempt" in ended.data.tags["error"]
            assert client.get_run(lost["dag/run 2"]).info.status == "RUNNING"
            assert client.get_run(unnamed.id).info.status == "RUNNING"
    with tracking.run(here, "once more", origin="dag/it's run 1"):
        assert client.get_run(again.id).info.status == "FINISHED"


def test_a_run_that_was_cut_off_goes_on_under_its_own_id(here, client):
    manifest = small_dataset(here)
    command = [sys.executable, "-c", CUT_OFF, here.tracking_uri, "dag/resumes"]
    lost = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    begun = client.get_run(lost)
    assert begun.info.status == "RUNNING"
    other = client.create_run(begun.info.experiment_id, tags={"origin": "dag/resumes"}).info.run_id
    client.set_tag(lost, "git.sha", "an older commit")
    with tracking.run(here, "another name", tags={"command": "cifar10"}, origin="dag/resumes", run_id=lost) as run:
        assert run.id == lost
        assert client.get_run(lost).info.status == "RUNNING"
        assert client.get_run(other).info.status == "KILLED"
        run.log_dataset(manifest)
    stored = client.get_run(lost)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "cut off"
    tags = stored.data.tags
    assert (tags["origin"], tags["command"], tags["resumed"]) == ("dag/resumes", "cifar10", "1")
    # What made its first half stays said, and so does what made the second.
    assert tags["git.sha"] == run.tags["git.sha"] == "an older commit"
    assert len(tags["resumed.git.sha"]) == 40
    assert "resumed.version.numpy" not in tags


def test_a_resumed_run_may_say_all_of_it_again_and_can_fail_again(here, client):
    manifest = small_dataset(here)
    ids: set[str] = set()

    def interrupted(attempt: int) -> None:
        with tracking.run(here, "resumes", run_id=next(iter(ids), None)) as run:
            run.log_params({"epochs": 3, "stages": {"fit": {"rate": 0.1}}})
            run.log_dataset(manifest)
            run.log_metrics({"fit/loss": 1.0 / (attempt + 1)}, step=attempt)
            ids.add(run.id)
            raise KeyboardInterrupt(f"interrupted in attempt {attempt}")

    for attempt in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted(attempt)
        (run_id,) = ids
        assert client.get_run(run_id).info.status == "KILLED"
        assert str(attempt) in client.get_run(run_id).data.tags["error"]
    with tracking.run(here, "resumes", run_id=run_id) as run:
        run.log_params({"epochs": 3, "stages": {"fit": {"rate": 0.1}}})
        with pytest.raises(RegistryError, match="epochs"):
            run.log_params({"epochs": 4})
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "fit/loss")] == [0, 1, 2]
    assert len(stored.inputs.dataset_inputs) == 1
    assert "error" not in stored.data.tags
    assert (stored.data.tags["resumed"], stored.data.tags["resumed.after"]) == ("3", "interrupted in attempt 2")


def test_what_is_finished_or_not_there_is_not_resumed(here, client):
    with tracking.run(here, "done") as done:
        pass
    with tracking.run(here, "elsewhere", experiment="another") as elsewhere:
        pass
    for run_id, error, words in (
        (done.id, RegistryError, "finished"),
        ("0" * 32, RunNotFound, "has no run"),
        (elsewhere.id, RunNotFound, "another experiment"),
    ):
        with pytest.raises(error, match=words) as caught, tracking.run(here, "never", run_id=run_id):
            pytest.fail("the block ran")
        assert "anew" in caught.value.fix
    assert client.get_run(done.id).info.status == "FINISHED"


def test_a_run_that_has_ended_can_still_be_marked(here, client):
    with tracking.run(here, "done", tags={"a": "1"}) as done:
        pass
    tracking.mark(here, done.id, {"a": "2", "b": "3"})
    stored = client.get_run(done.id)
    assert (stored.info.status, stored.data.tags["a"], stored.data.tags["b"]) == ("FINISHED", "2", "3")


def test_an_exploration_is_a_run_of_its_own_experiment(here, client, tmp_path):
    (tmp_path / "page.html").write_text("<html></html>")
    run_id = tracking.log_exploration(here, "ds-0123456789ab", tmp_path, {"images": 10})
    stored = client.get_run(run_id)
    assert client.get_experiment(stored.info.experiment_id).name == "cifar10-exploration"
    assert stored.data.params == {"dataset_id": "ds-0123456789ab", "images": "10"}
    assert [item.path for item in client.list_artifacts(run_id)] == ["page.html"]
    # A dataset never changes: explored again, it is the same run.
    assert tracking.log_exploration(here, "ds-0123456789ab", tmp_path, {"images": 10}) == run_id
    assert tracking.log_exploration(here, "ds-ba9876543210", tmp_path, {"images": 10}) != run_id


def test_nothing_is_begun_where_mlflow_is_away(settings):
    with pytest.raises(RegistryUnavailable, match="make up"), tracking.run(settings, "never"):
        pytest.fail("the block ran without a run")


def test_figures_survive_an_outage(here, line, client):
    through = here.model_copy(update={"mlflow_tracking_uri": line.uri})
    with tracking.run(through, "outage", patience_seconds=60) as run:
        run.log_metrics({"before": 1.0})
        line.cut()
        with pytest.raises(RegistryUnavailable):
            Registry(line.uri).versions()
        back = threading.Timer(1.5, line.mend)
        back.start()
        run.log_metrics({"during": 2.0})
        back.join()
    stored = client.get_run(run.id)
    assert stored.data.metrics == {"before": 1.0, "during": 2.0}
    assert stored.info.status == "FINISHED"


def test_figures_survive_an_outage_of_mlflows_database(here, postgres, client):
    with tracking.run(here, "database-outage", patience_seconds=60) as run:
        postgres.stop()
        back = threading.Timer(1.0, postgres.start)
        back.start()
        try:
            run.log_metrics({"during": 2.0})
        finally:
            back.join()
    stored = client.get_run(run.id)
    assert (stored.data.metrics, stored.info.status) == ({"during": 2.0}, "FINISHED")


def test_a_trained_model_survives_an_outage_and_is_registered_once(here, line, tmp_path):
    empty_registry(here.tracking_uri)
    manifest = small_dataset(here)
    through = here.model_copy(update={"mlflow_tracking_uri": line.uri})
    original = tracking.patiently
    cuts = []

    def cutting(call, *, what, seconds):
        """Cuts the line before each step of the registration, and mends it while the step is being repeated."""
        line.cut()
        cuts.append(what)
        back = threading.Timer(0.3, line.mend)
        back.start()
        try:
            return original(call, what=what, seconds=seconds)
        finally:
            back.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml.registry.packaging.patiently", cutting)
        version = register_tiny(through, manifest, tmp_path)
    assert len(cuts) >= 4
    registry = Registry(here.tracking_uri)
    assert [item.version for item in registry.versions()] == [version.version]
    assert registry.by_alias("challenger") == version
    assert (registry.fetch(version, here.cache_dir) / "artifacts/model.keras").is_file()


def test_an_outage_that_lasts_ends_in_an_error(here, line):
    through = here.model_copy(update={"mlflow_tracking_uri": line.uri})

    def train() -> None:
        with tracking.run(through, "lost", patience_seconds=1) as run:
            line.cut()
            run.log_metrics({"loss": 1.0})

    with pytest.raises(RegistryUnavailable):
        train()
    line.mend()


def test_the_version_is_not_made_twice_when_its_answer_is_lost(here, tmp_path, monkeypatch):
    empty_registry(here.tracking_uri)
    lost = []
    create = MlflowClient.create_model_version

    def create_and_lose_the_answer(self, *arguments, **named):
        made = create(self, *arguments, **named)
        if not lost:
            lost.append(made)
            raise RegistryUnavailable("The line broke.", fix="wait")
        return made

    monkeypatch.setattr(MlflowClient, "create_model_version", create_and_lose_the_answer)
    version = register_tiny(here, small_dataset(here), tmp_path)
    assert len(lost) == 1
    assert [item.version for item in Registry(here.tracking_uri).versions()] == [version.version] == [1]


def test_two_first_runs_share_the_experiment_that_one_of_them_makes(here, client):
    name = "made-by-two"
    found = []

    def begin() -> None:
        with tracking.run(here, "either", experiment=name) as run:
            found.append(client.get_run(run.id).info.experiment_id)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1


def test_a_manifest_needs_only_what_a_dataset_says_of_itself(here, client):
    manifest = SimpleNamespace(data="SYNTHETIC", dataset_id="ds-1", counts={"test": 1})
    with tracking.run(here, "minimal") as run:
        run.log_dataset(manifest)  # type: ignore[arg-type]
    assert client.get_run(run.id).inputs.dataset_inputs[0].dataset.name == "SYNTHETIC ds-1"
