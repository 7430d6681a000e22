"""The DAG that both trainings are: choose dataset and recipe, train in a pool of one slot, announce the candidate."""

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, dag, task
from airflow.sdk.exceptions import AirflowFailException

from dags import cifar10_form as form
from dags.cifar10_shared import (
    DATASET,
    TASK_DEFAULTS,
    attempt,
    request_of,
    settings_for,
)

TRAINING_POOL = "training"
TRAINING_QUEUE = "training"


def training_dag(dag_id: str, architecture: str, candidate: Asset, *, timeout: timedelta, doc_md: str) -> None:
    """Declares a DAG that trains one architecture and announces the candidate."""

    @dag(
        dag_id=dag_id,
        schedule=[DATASET],
        max_active_runs=1,
        doc_md=doc_md,
        tags=["cifar10", "training"],
        default_args=TASK_DEFAULTS,
        params={
            "recipe": form.RECIPE,
            "dataset_id": form.DATASET_ID,
            "test_limit": form.TEST_LIMIT,
            "weights": form.WEIGHTS,
            "retraining_id": form.RETRAINING_ID,
        },
    )
    def training() -> None:
        @task
        def choose(**context: Any) -> dict[str, Any]:
            from ml.settings import load_settings
            from ml.workflows.monitor import start_retraining
            from ml.workflows.training_choice import choose as workflow

            settings, request = load_settings(), request_of(context)
            if request.get("retraining_id") is not None:
                attempt(lambda: start_retraining(settings, request["retraining_id"]))
            asked = {name: request.get(name) for name in ("dataset_id", "recipe")}
            return request | attempt(lambda: workflow(settings, architecture, **asked))

        # Celery's workers choose their queues; other executors look at none.
        @task(pool=TRAINING_POOL, queue=TRAINING_QUEUE, execution_timeout=timeout, outlets=[candidate])
        def train(
            request: dict[str, Any], *, run_id: Any = None, ti: Any = None, outlet_events: Any = None
        ) -> dict[str, Any]:
            from ml.workflows.training_choice import train as workflow

            asked = {name: request.get(name) for name in ("dataset_id", "recipe", "retraining_id")}
            asked |= {"origin": f"{dag_id}/{run_id}", "resume": "if there" if ti.try_number > 1 else "no"}
            result = attempt(lambda: workflow(settings_for(request), architecture, **asked))
            outlet_events[candidate].extra = request | {"version": result["version"]}
            return result

        @task(trigger_rule="one_failed")
        def close_failed_retraining(*, params: Any = None) -> None:
            from ml.settings import load_settings
            from ml.workflows.monitor import finish_retraining

            if params["retraining_id"] is not None:
                attempt(lambda: finish_retraining(load_settings(), params["retraining_id"], "training failed"))
            # A leaf that succeeds would make a failed run look green.
            raise AirflowFailException("The training failed; see the tasks before this one.")

        request = choose()
        [request, train(request)] >> close_failed_retraining()

    training()
