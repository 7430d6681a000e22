"""### Promote the best model

Chooses among the candidates of one dataset by validation accuracy, scores that one and the champion on the same test
images, and moves the alias `champion` only where the candidate is better. The reason and the figures stand on the
version in MLflow. The prediction server follows the alias.
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import dag, task

from dags.cifar10_shared import (
    BASELINE_CANDIDATE,
    DATASET_PARAM,
    NEW_LINEAGE_PARAM,
    RETRIES,
    TEST_LIMIT_PARAM,
    VGG16_CANDIDATE,
    attempt,
    request_of,
)


@dag(
    dag_id="cifar10_promote",
    schedule=(BASELINE_CANDIDATE | VGG16_CANDIDATE),
    max_active_runs=1,
    doc_md=__doc__,
    tags=["cifar10", "gate"],
    default_args=RETRIES,
    params={
        "dataset_id": DATASET_PARAM,
        "test_limit": TEST_LIMIT_PARAM,
        "new_lineage": NEW_LINEAGE_PARAM,
    },
)
def cifar10_promote() -> None:
    @task(execution_timeout=timedelta(minutes=60))
    def promote(**context: Any) -> dict[str, Any]:
        from ml.settings import load_settings
        from ml.workflows.monitor import finish_retraining
        from ml.workflows.promote import promote as workflow

        settings, request = load_settings(), request_of(context)
        names = ("dataset_id", "test_limit", "new_lineage")
        result = attempt(lambda: workflow(settings, **{name: request[name] for name in names if name in request}))
        for event in [e for found in (context.get("triggering_asset_events") or {}).values() for e in found]:
            if event.extra.get("retraining_id") is not None:
                outcome = "promoted" if result["promoted"] else "refused"
                finish_retraining(settings, event.extra["retraining_id"], f"{outcome}: {result['reason']}")
        return result

    promote()


cifar10_promote()
