"""### Promote the best model

Chooses among the candidates of one dataset by validation accuracy, scores that one and the champion on the same test
images, and moves the alias `champion` only where the candidate is better. The reason and the figures stand on the
version in MLflow. The prediction server follows the alias.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

from dags import cifar10_form as form
from dags.cifar10_shared import (
    BASELINE_CANDIDATE,
    TASK_DEFAULTS,
    VGG16_CANDIDATE,
    attempt,
    request_of,
    retrainings_of,
)


@dag(
    dag_id="cifar10_promote",
    schedule=(BASELINE_CANDIDATE | VGG16_CANDIDATE),
    max_active_runs=1,
    doc_md=__doc__,
    tags=["cifar10", "gate"],
    default_args=TASK_DEFAULTS,
    params={"dataset_id": form.DATASET_ID, "test_limit": form.TEST_LIMIT, "new_lineage": form.NEW_LINEAGE},
)
def cifar10_promote() -> None:
    @task(execution_timeout=timedelta(minutes=60))
    def promote(**context: Any) -> dict[str, Any]:
        from ml.settings import load_settings
        from ml.workflows.promote import promote as workflow

        settings, request = load_settings(), request_of(context)
        names = ("dataset_id", "test_limit", "new_lineage")
        return attempt(lambda: workflow(settings, **{name: request[name] for name in names if name in request}))

    @task
    def close_retrainings(**context: Any) -> None:
        from ml.settings import load_settings
        from ml.workflows.monitor import finish_retraining
        from ml.workflows.promote import verdict_of

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
    judged >> closed
    [judged, closed] >> close_failed_retrainings()


cifar10_promote()
