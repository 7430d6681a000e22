"""The DAG files as Airflow reads them: what they declare."""

import ast
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

DAGS = Path(__file__).parents[2] / "dags"
DAG_IDS = {
    "cifar10_ingest",
    "cifar10_train_baseline",
    "cifar10_finetune_vgg16",
    "cifar10_promote",
    "cifar10_monitor",
}
TRAINERS = ("cifar10_train_baseline", "cifar10_finetune_vgg16")


def test_all_five_are_read_without_an_error(dag_bag):
    assert dag_bag.import_errors == {}
    assert set(dag_bag.dags) == DAG_IDS


@pytest.mark.parametrize("path", sorted(DAGS.glob("*.py")), ids=lambda path: path.name)
def test_a_dag_file_is_short_and_imports_nothing_heavy_when_it_is_parsed(path):
    source = path.read_text()
    allowed = {"airflow", "dags", *sys.stdlib_module_names}
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= allowed
    assert len(source.splitlines()) < 80


def test_the_dataset_starts_both_trainings_and_a_candidate_starts_the_gate(dag_bag):
    ingest = dag_bag.dags["cifar10_ingest"].get_task("ingest")
    candidates = set()
    for dag_id in TRAINERS:
        dag = dag_bag.dags[dag_id]
        assert [asset.uri for asset in dag.timetable.asset_condition.objects] == [ingest.outlets[0].uri]
        candidates |= {asset.uri for asset in dag.get_task("train").outlets}
    gate = dag_bag.dags["cifar10_promote"].timetable.asset_condition
    assert type(gate).__name__ == "AssetAny"
    assert {asset.uri for asset in gate.objects} == candidates
    assert len(candidates) == 2


def test_two_trainings_share_a_pool_of_one(dag_bag):
    from dags.cifar10_training import TRAINING_POOL
    from ml.stack.components import TRAINING_POOL as MADE_BY_THE_STACK

    assert {dag_bag.dags[dag_id].get_task("train").pool for dag_id in TRAINERS} == {TRAINING_POOL}
    assert TRAINING_POOL == MADE_BY_THE_STACK


def test_only_trainings_wait_in_the_queue_for_trainings(dag_bag):
    waiting = {task.dag_id for dag in dag_bag.dags.values() for task in dag.tasks if task.queue == "training"}
    assert waiting == set(TRAINERS)
    assert {dag_bag.dags[dag_id].get_task("train").queue for dag_id in TRAINERS} == {"training"}


def test_every_dag_is_documented_and_its_tasks_retry_with_backoff(dag_bag):
    for dag in dag_bag.dags.values():
        assert dag.doc_md
        assert dag.max_active_runs == 1
        assert not dag.catchup
        for task in dag.tasks:
            assert task.retries > 0, task
            assert task.retry_exponential_backoff > 1, task


def test_every_task_has_a_time_limit(dag_bag):
    tasks = [task for dag in dag_bag.dags.values() for task in dag.tasks]
    assert [task.task_id for task in tasks if task.execution_timeout is None] == []
    training = {dag_id: dag_bag.dags[dag_id].get_task("train").execution_timeout for dag_id in TRAINERS}
    assert training == {"cifar10_train_baseline": timedelta(hours=3), "cifar10_finetune_vgg16": timedelta(hours=12)}


@pytest.mark.parametrize(
    ("dag_id", "name", "wrong"),
    [
        ("cifar10_ingest", "source", 7),
        ("cifar10_ingest", "recipe", "no such recipe"),
        ("cifar10_train_baseline", "recipe", "no such recipe"),
        ("cifar10_promote", "test_limit", 3),
        ("cifar10_monitor", "min_predictions", "many"),
    ],
)
def test_the_trigger_form_refuses_what_cannot_work(dag_bag, dag_id, name, wrong):
    from airflow.sdk.exceptions import ParamValidationError

    params = dag_bag.dags[dag_id].params
    with pytest.raises(ParamValidationError):
        params[name] = wrong


def test_the_form_offers_every_recipe_that_can_be_trained_by_and_no_search(dag_bag):
    from dags.cifar10_shared import TRAINERS as BY_ARCHITECTURE
    from ml.training.recipe import RECIPES_DIR, available_recipes

    offered = {name for name in dag_bag.dags["cifar10_ingest"].params.get_param("recipe").schema["enum"] if name}
    assert offered == {name for architecture in BY_ARCHITECTURE for name in available_recipes(architecture)}
    searches = {path.stem for path in (RECIPES_DIR / "sweeps").glob("*.toml")}
    assert searches
    assert searches.isdisjoint(offered)


def test_the_monitor_retrains_the_architecture_it_watched(dag_bag):
    from dags.cifar10_shared import TRAINERS as BY_ARCHITECTURE

    assert set(BY_ARCHITECTURE.values()) == set(TRAINERS)
    assert set(BY_ARCHITECTURE.values()) <= set(dag_bag.dags)


def event(at, **extra):
    return SimpleNamespace(timestamp=at, extra=extra)


def test_a_typed_value_wins_over_the_event_and_a_later_event_over_an_earlier():
    from dags.cifar10_shared import request_of

    context = {
        "triggering_asset_events": {
            "a": [event(2, dataset_id="new")],
            "b": [event(1, dataset_id="old", recipe="demo")],
        },
        "params": {"recipe": "report", "dataset_id": None},
    }
    assert request_of(context) == {"dataset_id": "new", "recipe": "report"}
    assert request_of({"params": {"dataset_id": None}}) == {}


def test_each_candidate_of_a_retraining_is_found_and_no_other():
    from dags.cifar10_shared import retrainings_of

    events = {"a": [event(2, version=5, retraining_id=2), event(3, version=6)], "b": [event(1, retraining_id=1)]}
    assert [extra["retraining_id"] for extra in retrainings_of({"triggering_asset_events": events})] == [1, 2]
    assert retrainings_of({}) == []


def test_a_lasting_error_is_not_tried_again_and_a_passing_one_is():
    from airflow.sdk.exceptions import AirflowFailException

    from dags.cifar10_shared import attempt
    from ml.errors import RegistryUnavailable, SourceCorrupt

    def fail_with(error):
        def work():
            raise error

        return work

    with pytest.raises(AirflowFailException, match="md5"):
        attempt(fail_with(SourceCorrupt("Wrong md5.", fix="fetch it again.")))
    with pytest.raises(RegistryUnavailable):
        attempt(fail_with(RegistryUnavailable("MLflow is away.", fix="start it.")))
