"""### Promote the best model

Checks each candidate by itself (in a fresh process, on the test images, under corruption), chooses among those of one
dataset by validation accuracy, compares that one with the champion on the same test images, and moves the alias
`champion` only where it is better. The report stands on the version in MLflow (the task's link "Gate report"). The
prediction server follows the alias.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

from dags import cifar10_form as form
from dags.cifar10_links import GateReport
from dags.cifar10_shared import BASELINE_CANDIDATE, TASK_DEFAULTS, VGG16_CANDIDATE, attempt, request_of, retrainings_of


@dag(
    dag_id="cifar10_promote",
    schedule=(BASELINE_CANDIDATE | VGG16_CANDIDATE),
    max_active_runs=1,
    doc_md=__doc__,
    tags=["cifar10", "gate"],
    default_args=TASK_DEFAULTS,
    params=form.PROMOTION,
)
def cifar10_promote() -> None:
    @task(execution_timeout=timedelta(minutes=60))
    def promote(**context: Any) -> dict[str, Any]:
        from ml.settings import load_settings
        from ml.workflows.promote import promote as workflow

        settings, request = load_settings(), request_of(context)
        return attempt(
            lambda: workflow(settings, **{name: request[name] for name in form.PROMOTION if name in request})
        )

    @task
    def close_retrainings(**context: Any) -> None:
        from ml.settings import load_settings
        from ml.workflows.monitor import finish_retraining
        from ml.workflows.verdicts import verdict_of

        def work() -> None:
            settings = load_settings()
            for asked in retrainings_of(context):
                verdict = verdict_of(settings, asked["version"])
                outcome = f"{verdict['decision']}: {verdict['reason'] or 'this run did not judge it'}"
                finish_retraining(settings, asked["retraining_id"], outcome)

        attempt(work)

    @task(trigger_rule="one_failed")
    def close_failed_retrainings(**context: Any) -> None:
        from ml.settings import load_settings
        from ml.workflows.monitor import finish_retraining

        def work() -> None:
            for asked in retrainings_of(context):
                finish_retraining(load_settings(), asked["retraining_id"], "the gate failed")

        attempt(work)
        # A leaf that succeeds would make a failed run look green.
        raise AirflowFailException("The gate failed; see the tasks before this one.")

    judged, closed = promote(), close_retrainings()
    judged.operator.operator_extra_links = (GateReport(),)
    judged >> closed
    [judged, closed] >> close_failed_retrainings()


cifar10_promote()
