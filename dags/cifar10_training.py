"""The DAG that both trainings are: choose dataset and recipe, train in a pool of one slot, announce the candidate."""

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, Param, dag, task
from airflow.sdk.exceptions import AirflowFailException

from dags.cifar10_shared import DATASET, DATASET_PARAM, RECIPE_PARAM, RETRIES, TEST_LIMIT_PARAM, attempt, request_of

TRAINING_POOL = "training"


def training_dag(dag_id: str, architecture: str, candidate: Asset, *, timeout: timedelta, doc_md: str) -> None:
    """Declares a DAG that trains one architecture and announces the candidate."""

    @dag(
        dag_id=dag_id,
        schedule=[DATASET],
        max_active_runs=1,
        doc_md=doc_md,
        tags=["cifar10", "training"],
        default_args=RETRIES,
        params={
            "recipe": RECIPE_PARAM,
            "dataset_id": DATASET_PARAM,
            "test_limit": TEST_LIMIT_PARAM,
            "retraining_id": Param(None, type=["null", "integer"], description="Set by the monitor; leave empty."),
        },
    )
    def training() -> None:
        @task(execution_timeout=timedelta(minutes=5))
        def choose(**context: Any) -> dict[str, Any]:
            from ml.datasets.store import latest_dataset_id
            from ml.settings import load_settings

            settings = load_settings()
            request = {"recipe": "report"} | request_of(context)
            if "dataset_id" in request:
                return request
            return attempt(lambda: request | {"dataset_id": latest_dataset_id(settings.data_url)})

        @task(pool=TRAINING_POOL, execution_timeout=timeout, outlets=[candidate])
        def train(request: dict[str, Any], *, outlet_events: Any = None) -> dict[str, Any]:
            from ml.settings import load_settings
            from ml.training.recipe import load_recipe
            from ml.workflows import train as workflow

            def work() -> dict[str, Any]:
                recipe = load_recipe(architecture, request["recipe"])
                # A retraining by the same seed on the same data would only make the same model again.
                recipe = recipe.with_overrides(seed=recipe.seed + (request.get("retraining_id") or 0))
                return workflow.train(load_settings(), architecture, request["dataset_id"], recipe)

            result = attempt(work)
            outlet_events[candidate].extra = request | {"version": result["version"]}
            return result

        @task(trigger_rule="one_failed", execution_timeout=timedelta(minutes=5))
        def close_failed_retraining(*, params: Any = None) -> None:
            from ml.settings import load_settings
            from ml.workflows.monitor import finish_retraining

            if params["retraining_id"] is not None:
                finish_retraining(load_settings(), params["retraining_id"], "training failed")
            # A leaf that succeeds would make a failed run look green.
            raise AirflowFailException("The training failed; see the tasks before this one.")

        request = choose()
        [request, train(request)] >> close_failed_retraining()

    training()
