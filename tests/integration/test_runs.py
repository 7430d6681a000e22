"""Runs read back from a real MLflow: what there is, what there is not, and what could not be asked."""

import pytest
from mlflow import MlflowClient

from ml.errors import RegistryError, RegistryUnavailable, RunNotFound
from ml.registry import tracking
from ml.registry.runs import Runs


@pytest.fixture
def here(settings, mlflow_uri):
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@pytest.fixture
def experiment(request):
    """One of the test's own."""
    return f"runs-{request.node.name}"[:200]


def train(here, experiment, recipe="report", architecture="baseline", *, fails=False):
    tags = {"architecture": architecture, "recipe": recipe, "seed": "3"}
    try:
        with tracking.run(here, f"{architecture}-{recipe}", tags=tags, experiment=experiment) as run:
            run.log_params({"seed": 3})
            for epoch, loss in enumerate((2.0, 1.0)):
                run.log_metrics({"fit/loss": loss}, step=epoch)
            run.log_metrics({"test_accuracy": 0.5})
            run.log_dict({"name": recipe}, "recipe.json")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    return run.id


def test_finished_runs_come_back_newest_first_and_by_name(here, experiment):
    runs = Runs(here.tracking_uri, experiment)
    assert runs.finished() == []  # nobody has made the experiment yet
    first = train(here, experiment)
    train(here, experiment, fails=True)
    second = train(here, experiment, "it's best")
    third = train(here, experiment, "report", "vgg16")
    assert [run.run_id for run in runs.finished()] == [third, second, first]
    assert [run.run_id for run in runs.finished(architecture="baseline")] == [second, first]
    assert [run.run_id for run in runs.finished(recipes=["it's best", "none"])] == [second]
    assert [run.run_id for run in runs.finished(architecture="vgg16", recipes=["report"])] == [third]
    (found,) = runs.finished(architecture="vgg16")
    assert (found.architecture, found.recipe, found.name, found.status) == (
        "vgg16",
        "report",
        "vgg16-report",
        "FINISHED",
    )
    assert found.params == {"seed": "3"}
    assert found.metrics == {"fit/loss": 1.0, "test_accuracy": 0.5}
    assert found.tags["seed"] == "3"
    assert runs.by_id(third) == found


def test_more_runs_than_a_page_holds_are_all_found(here, experiment, monkeypatch):
    made = [train(here, experiment) for _ in range(3)]
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: search(*a, **(k | {"max_results": 2})))
    assert [run.run_id for run in Runs(here.tracking_uri, experiment).finished()] == made[::-1]


def test_a_curve_has_each_epoch_once_as_it_was_run_last(here, experiment):
    runs = Runs(here.tracking_uri, experiment)
    run_id = train(here, experiment, fails=True)
    assert runs.by_id(run_id).status == "FAILED"
    client = MlflowClient(here.tracking_uri)
    later = client.get_metric_history(run_id, "fit/loss")[0].timestamp + 60_000
    client.log_metric(run_id, "fit/loss", 0.9, timestamp=later, step=1)
    client.log_metric(run_id, "fit/loss", 0.5, timestamp=later, step=2)
    assert runs.curves(runs.by_id(run_id)) == {
        "fit/loss": ((0, 2.0), (1, 0.9), (2, 0.5)),
        "test_accuracy": ((0, 0.5),),
    }


def test_documents_come_back_and_a_missing_one_is_none(here, experiment, tmp_path):
    runs = Runs(here.tracking_uri, experiment)
    run_id = train(here, experiment)
    assert runs.document(run_id, "recipe.json") == {"name": "report"}
    assert runs.document(run_id, "robustness.json") is None
    (tmp_path / "history.json").write_text("[1, 2")
    MlflowClient(here.tracking_uri).log_artifact(run_id, str(tmp_path / "history.json"))
    with pytest.raises(RegistryError, match=r"history\.json of run .* is not a JSON object"):
        runs.document(run_id, "history.json")


def test_a_run_that_is_not_there_is_no_run(here, experiment):
    runs = Runs(here.tracking_uri, experiment)
    deleted = train(here, experiment)
    MlflowClient(here.tracking_uri).delete_run(deleted)
    elsewhere = train(here, experiment + "-other")
    for run_id in ("0" * 32, deleted, elsewhere):
        with pytest.raises(RunNotFound, match=run_id):
            runs.by_id(run_id)
    assert runs.finished() == []
    with pytest.raises(RegistryError):
        runs.by_id("no id/at all")


def test_an_mlflow_that_is_away_is_not_an_mlflow_without_runs(settings):
    runs = Runs(settings.tracking_uri)
    for ask in (
        runs.finished,
        lambda: runs.by_id("0" * 32),
        lambda: runs.document("0" * 32, "recipe.json"),
    ):
        with pytest.raises(RegistryUnavailable):
            ask()
