"""The DAGs run by Airflow's own `dag.test()`, on generated data."""

import pytest

from ml.datasets.store import list_datasets


@pytest.fixture
def in_a_folder_of_its_own(monkeypatch, tmp_path, mlflow_uri, database_url):
    """Tasks read their settings from the environment, as in production."""
    for name, value in {
        "MLOPS_VAR_DIR": str(tmp_path),
        "MLOPS_DATA_URL": (tmp_path / "data").as_uri(),
        "CIFAR10_SOURCE": "synthetic",
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLOPS_DATABASE_URL": database_url,
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


def test_with_nothing_to_judge_the_gate_says_so(dag_bag, in_a_folder_of_its_own):
    run = dag_bag.dags["cifar10_promote"].test()
    assert states(run) == {"promote": "success"}
