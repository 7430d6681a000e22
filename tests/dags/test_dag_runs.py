"""The DAGs run by Airflow's own `dag.test()`, on generated data."""

import sys
from types import SimpleNamespace

import pytest
from sqlalchemy import select

from ml.database import transaction
from ml.datasets.store import list_datasets, write_dataset
from ml.datasets.synthetic import generate
from ml.errors import ModelInvalid


@pytest.fixture
def in_a_folder_of_its_own(monkeypatch, tmp_path, mlflow_uri, database_url):
    """Tasks read their settings from the environment, as in production."""
    for name, value in {
        "MLOPS_VAR_DIR": str(tmp_path),
        "MLOPS_DATA_URL": (tmp_path / "data").as_uri(),
        "CIFAR10_SOURCE": "synthetic",
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLOPS_DATABASE_URL": database_url,
        "KERAS_BACKEND": "tensorflow",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def states(run):
    return {task.task_id: task.state for task in run.get_task_instances()}


def test_ingestion_stores_explores_and_exports(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_ingest"].test()
    assert states(run) == {"ingest": "success", "explore": "success", "wants_csv": "success", "export_csv": "success"}
    (manifest,) = list_datasets((in_a_folder_of_its_own / "data").as_uri())
    assert manifest.data == "SYNTHETIC"
    assert list((in_a_folder_of_its_own / "data").rglob("*.csv.gz"))


def test_the_csv_export_can_be_left_out(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_ingest"].test(run_conf={"export_csv": False})
    assert states(run)["export_csv"] == "skipped"
    assert not list((in_a_folder_of_its_own / "data").rglob("*.csv.gz"))


def test_a_source_that_is_not_there_fails_the_run_and_leaves_nothing(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_ingest"].test(run_conf={"source": "/nowhere/cifar.tar.gz"})
    assert run.state == "failed"
    assert states(run)["ingest"] == "failed"
    assert list_datasets((in_a_folder_of_its_own / "data").as_uri()) == []


def test_without_a_champion_the_monitor_is_skipped_not_failed(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_monitor"].test()
    assert run.state == "success"
    assert set(states(run).values()) == {"skipped"}


def test_a_training_without_a_dataset_fails_and_names_the_fix(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_train_baseline"].test(run_conf={"recipe": "demo"})
    assert run.state == "failed"
    assert states(run)["choose"] == "failed"


@pytest.fixture
def retraining(in_a_folder_of_its_own, database_url):
    """The id of a retraining that was asked for and that no trainer has taken."""
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO monitor_windows (model_name, model_version, n, verdict) "
            "VALUES ('cifar10-classifier', 1, 0, 'drift') RETURNING id"
        )
        cursor.execute(
            "INSERT INTO retrainings (window_id, architecture) VALUES (%s, 'baseline') RETURNING id", cursor.fetchone()
        )
        return cursor.fetchone()[0]


@pytest.fixture
def retraining_row(database_url):
    def read():
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT started_at IS NOT NULL, finished_at IS NOT NULL, outcome FROM retrainings")
            (row,) = cursor.fetchall()
            return row

    return read


@pytest.fixture
def trained(monkeypatch):
    """Stands for the training, and keeps what it was asked; importing the real one takes ten seconds."""
    calls = []

    def train_by_name(_settings, architecture, **asked):
        calls.append((architecture, asked))
        return {"version": 7}

    monkeypatch.setitem(sys.modules, "ml.workflows.train", SimpleNamespace(train_by_name=train_by_name))
    return calls


def newest_event(uri):
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session

    with create_session() as session:
        found = session.scalars(select(AssetEvent).order_by(AssetEvent.id.desc())).first()
        return found.asset.uri == uri and found.extra


def test_a_training_takes_its_retraining_and_announces_the_candidate_with_its_request(
    dag_bag, in_a_folder_of_its_own, retraining, retraining_row, trained
):
    older = write_dataset(generate(train=300, test=40, seed=1), (in_a_folder_of_its_own / "data").as_uri()).dataset_id
    write_dataset(generate(train=300, test=40, seed=2), (in_a_folder_of_its_own / "data").as_uri())
    asked = {"dataset_id": older, "recipe": "demo", "retraining_id": retraining}
    run = dag_bag.dags["cifar10_train_baseline"].test(run_conf=asked)
    assert states(run) == {"choose": "success", "train": "success", "close_failed_retraining": "skipped"}
    origin = f"cifar10_train_baseline/{run.run_id}"
    assert trained == [("baseline", asked | {"origin": origin, "resume": "no"})]
    assert newest_event("cifar10://candidate/baseline") == asked | {"version": 7}
    assert retraining_row() == (True, False, None)  # the gate closes it


def test_a_training_that_was_asked_for_nothing_takes_the_newest_dataset_and_the_report_recipe(
    dag_bag, in_a_folder_of_its_own, trained
):
    stored = write_dataset(generate(train=300, test=40, seed=1), (in_a_folder_of_its_own / "data").as_uri())
    run = dag_bag.dags["cifar10_finetune_vgg16"].test()
    assert run.state == "success"
    wanted = {"dataset_id": stored.dataset_id, "recipe": "report"}
    origin = f"cifar10_finetune_vgg16/{run.run_id}"
    assert trained == [("vgg16", wanted | {"retraining_id": None, "origin": origin, "resume": "no"})]
    assert newest_event("cifar10://candidate/vgg16") == wanted | {"version": 7}


@pytest.mark.parametrize("dag_id", ["cifar10_train_baseline", "cifar10_finetune_vgg16"])
def test_only_a_retry_goes_on_where_the_attempt_before_was_cut_off(dag_bag, in_a_folder_of_its_own, trained, dag_id):
    task = dag_bag.dags[dag_id].get_task("train")
    (candidate,) = task.outlets
    for attempt in (1, 2, 3):
        events = {candidate: SimpleNamespace(extra=None)}
        request = {"dataset_id": "ds-0", "recipe": "demo", "retraining_id": None}
        task.python_callable(request, run_id="r", ti=SimpleNamespace(try_number=attempt), outlet_events=events)
        assert events[candidate].extra == request | {"version": 7}
    assert [asked["resume"] for _, asked in trained] == ["no", "if there", "if there"]
    assert {asked["origin"] for _, asked in trained} == {f"{dag_id}/r"}, "one run at a time of one origin"


def test_a_retraining_that_fails_is_closed_and_the_run_is_not_green(dag_bag, retraining, retraining_row):
    run = dag_bag.dags["cifar10_train_baseline"].test(run_conf={"retraining_id": retraining})  # there is no dataset
    assert run.state == "failed"
    assert states(run) == {"choose": "failed", "train": "upstream_failed", "close_failed_retraining": "failed"}
    assert retraining_row() == (True, True, "training failed")


def test_a_due_retraining_makes_one_run_of_its_trainer(dag_bag, in_a_folder_of_its_own, monkeypatch):
    from airflow.models import DagRun
    from airflow.utils.session import create_session

    due = {
        "due": True,
        "architecture": "vgg16",
        "dataset_id": "ds-0123456789ab",
        "recipe": "demo",
        "retraining_id": 41,
        "reason": "",
    }
    monkeypatch.setattr("ml.workflows.monitor.monitor", lambda *_, **__: {"retraining": due})
    monitor = dag_bag.dags["cifar10_monitor"]
    assert set(states(monitor.test()).values()) == {"success"}
    handed_on = monitor.test(run_conf={"recipe": "report"})
    assert handed_on.state == "success"
    assert states(handed_on)["retrain"] == "skipped"
    with create_session() as session:
        made = session.scalars(select(DagRun).where(DagRun.run_id.startswith("retraining__"))).all()
        assert [(run.dag_id, run.run_id) for run in made] == [("cifar10_finetune_vgg16", "retraining__41")]
        assert made[0].conf == {"dataset_id": "ds-0123456789ab", "recipe": "demo", "retraining_id": 41}

    due["retraining_id"] = 42
    monitor.test(run_conf={"recipe": "report"})  # what was typed wins
    with create_session() as session:
        typed = session.scalars(select(DagRun).where(DagRun.run_id == "retraining__42")).one()
        assert typed.conf["recipe"] == "report"


def test_without_drift_no_trainer_is_started(dag_bag, in_a_folder_of_its_own, monkeypatch):
    stable = {"retraining": {"due": False}}
    monkeypatch.setattr("ml.workflows.monitor.monitor", lambda *_, **__: stable)
    run = dag_bag.dags["cifar10_monitor"].test()
    assert run.state == "success"
    assert states(run)["retrain"] == "skipped"


def test_with_nothing_to_judge_the_gate_says_so(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_promote"].test()
    assert states(run) == {
        "promote": "success",
        "close_retrainings": "success",
        "close_failed_retrainings": "skipped",
    }


def test_the_gates_task_passes_on_what_was_asked_and_links_to_the_report_of_what_it_promoted(
    dag_bag, in_a_folder_of_its_own, monkeypatch
):
    asked = {}

    def promote(settings, **request):
        asked.update(request)
        judged = [("refused", 9), ("promoted", 7), ("refused", 8)]
        return {
            "candidates": [
                {"decision": decision, "version": version, "report": f"http://mlflow/#/{version}"}
                for decision, version in judged
            ]
        }

    monkeypatch.setattr("ml.workflows.promote.promote", promote)
    run = dag_bag.dags["cifar10_promote"].test(run_conf={"after_shadow": 500, "test_limit": 1000})
    assert run.state == "success"
    assert asked == {"after_shadow": 500, "test_limit": 1000}
    assert extra_link(run, "promote", "Gate report") == "http://mlflow/#/7"


def extra_link(run, task_id, name):
    """Where the button of this name leads, as the API server answers the UI."""
    return run.dag.get_task(task_id).get_extra_links(run.get_task_instance(task_id), name)


def announce(monkeypatch, **extra):
    """Makes the next run of the gate one that this candidate's event triggered."""
    candidate = SimpleNamespace(timestamp=1, extra=extra)
    monkeypatch.setattr("dags.cifar10_shared._events", lambda _: [candidate])


@pytest.mark.parametrize("decision", ["promoted", "refused", "pending"])
def test_the_gates_verdict_on_its_candidate_closes_a_retraining(
    dag_bag, retraining, retraining_row, monkeypatch, decision
):
    announce(monkeypatch, version=7, retraining_id=retraining)
    # The gate ran before and was cut off: there is nothing left to judge, and the verdict stands on the version.
    monkeypatch.setattr("ml.workflows.promote.promote", lambda *_, **__: {"reason": "Nothing to judge"})
    verdicts = {7: {"decision": decision, "reason": "for a reason"}}
    monkeypatch.setattr("ml.workflows.verdicts.verdict_of", lambda _, version: verdicts[version])
    assert dag_bag.dags["cifar10_promote"].test().state == "success"
    assert retraining_row() == (False, True, f"{decision}: for a reason")


def test_a_gate_that_fails_closes_the_retraining_and_is_not_green(dag_bag, retraining, retraining_row, monkeypatch):
    def fail(*_, **__):
        raise ModelInvalid("The candidate is no model.", fix="train it again.")

    announce(monkeypatch, version=7, retraining_id=retraining)
    monkeypatch.setattr("ml.workflows.promote.promote", fail)
    run = dag_bag.dags["cifar10_promote"].test()
    assert run.state == "failed"
    assert states(run)["promote"] == "failed"
    assert retraining_row() == (False, True, "the gate failed")
