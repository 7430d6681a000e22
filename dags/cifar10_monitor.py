"""### Watch the live predictions

Compares the predictions since the last window with the champion's reference: an Evidently report for people, a
calibrated test for the verdict, live accuracy where labels were sent. On drift: an alert, and a retraining of the
champion's architecture, on its dataset and by its recipe, unless one runs or ran a short while ago. A retraining that
was asked for and never started is started by the next run.
"""

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import CronTriggerTimetable, Param, dag, task
from airflow.sdk.exceptions import AirflowSkipException

from dags import cifar10_form as form
from dags.cifar10_shared import TASK_DEFAULTS, TRAINERS, attempt


@dag(
    dag_id="cifar10_monitor",
    schedule=CronTriggerTimetable("@hourly", timezone="UTC", run_immediately=False),
    max_active_runs=1,
    doc_md=__doc__,
    tags=["cifar10", "monitoring"],
    default_args=TASK_DEFAULTS,
    params={
        "min_predictions": Param(
            None, type=["null", "integer"], minimum=2, title="Fewest predictions", description="Fewer: `insufficient`."
        ),
        "recipe": form.RECIPE,
    },
)
def cifar10_monitor() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    def monitor(*, params: Any = None) -> dict[str, Any]:
        from ml.errors import ModelNotFound
        from ml.settings import load_settings
        from ml.workflows.monitor import monitor as workflow

        settings = load_settings()

        def work() -> dict[str, Any]:
            try:
                return workflow(settings, min_predictions=params["min_predictions"])
            except ModelNotFound as error:
                raise AirflowSkipException(f"Nothing to watch yet. {error}") from error

        return attempt(work)

    @task.short_circuit
    def retraining_is_due(result: dict[str, Any]) -> bool:
        return result["retraining"]["due"]

    @task
    def request_retraining(result: dict[str, Any], *, params: Any = None) -> dict[str, Any]:
        due = result["retraining"]
        conf = {name: due[name] for name in ("dataset_id", "recipe", "retraining_id")}
        if params["recipe"] is not None:
            conf["recipe"] = params["recipe"]
        run_id = f"retraining__{due['retraining_id']}"
        return {"trainer": TRAINERS[due["architecture"]], "run_id": run_id, "conf": conf}

    verdict = monitor()
    request = request_retraining(verdict)
    retrain = TriggerDagRunOperator(
        task_id="retrain",
        trigger_dag_id="{{ ti.xcom_pull('request_retraining')['trainer'] }}",
        # A retraining is handed on until its trainer has begun; its run is made once.
        trigger_run_id="{{ ti.xcom_pull('request_retraining')['run_id'] }}",
        skip_when_already_exists=True,
        conf=request["conf"],
    )
    retraining_is_due(verdict) >> request >> retrain


cifar10_monitor()
