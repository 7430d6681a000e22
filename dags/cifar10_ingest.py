"""### Ingest CIFAR-10

Resolves the source, verifies every batch file, parses without trusting pickles, checks, splits by content, and writes
a versioned dataset. The same input gives the same id and writes nothing. Both trainings follow by themselves.

Then, beside the trainings: the CSV export, and the exploration page in MLflow (experiment `cifar10-exploration`).
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, dag, task

from dags import cifar10_form as form
from dags.cifar10_shared import (
    DATASET,
    TASK_DEFAULTS,
    attempt,
    settings_for,
)

PASSED_ON = ("recipe", "test_limit", "new_lineage", "weights", "allow_stand_in")


@dag(
    dag_id="cifar10_ingest",
    schedule=None,
    max_active_runs=1,
    doc_md=__doc__,
    tags=["cifar10", "data"],
    default_args=TASK_DEFAULTS,
    params={
        "source": form.SOURCE,
        "recipe": form.RECIPE,
        "test_limit": form.TEST_LIMIT,
        "new_lineage": form.NEW_LINEAGE,
        "weights": form.WEIGHTS,
        "allow_stand_in": form.ALLOW_STAND_IN,
        "export_csv": Param(True, type="boolean", title="Export CSV", description="About 60,000 rows, gzip."),
    },
)
def cifar10_ingest() -> None:
    @task(execution_timeout=timedelta(minutes=30), outlets=[DATASET])
    def ingest(*, params: Any = None, outlet_events: Any = None) -> dict[str, Any]:
        from ml.workflows import ingest as workflow

        asked = {name: params[name] for name in PASSED_ON if params[name] is not None}
        result = attempt(lambda: workflow.ingest(settings_for(asked), params["source"]))
        outlet_events[DATASET].extra = {"dataset_id": result["dataset_id"], **asked}
        return result

    @task(execution_timeout=timedelta(minutes=30))
    def explore(dataset_id: str) -> dict[str, Any]:
        from ml.settings import load_settings
        from ml.workflows import ingest as workflow

        return attempt(lambda: workflow.explore(load_settings(), dataset_id))

    @task.short_circuit
    def wants_csv(*, params: Any = None) -> bool:
        return params["export_csv"]

    @task(execution_timeout=timedelta(minutes=30))
    def export_csv(dataset_id: str) -> dict[str, Any]:
        from ml.settings import load_settings
        from ml.workflows import ingest as workflow

        return attempt(lambda: workflow.export_csv(load_settings(), dataset_id))

    dataset = ingest()
    explore(dataset["dataset_id"])
    wants_csv() >> export_csv(dataset["dataset_id"])


cifar10_ingest()
