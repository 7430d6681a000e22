"""What the five DAGs share: the assets that join them, how tasks retry, and how a request travels from DAG to DAG.

A request (dataset id, recipe, test limit, retraining id) rides on asset events as their `extra`; a value typed into
the trigger form wins over it. Ids travel, never data.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, Param
from airflow.sdk.exceptions import AirflowFailException

DATASET = Asset("cifar10_dataset", uri="cifar10://dataset")
BASELINE_CANDIDATE = Asset("cifar10_baseline_candidate", uri="cifar10://candidate/baseline")
VGG16_CANDIDATE = Asset("cifar10_vgg16_candidate", uri="cifar10://candidate/vgg16")

TRAINERS = {"baseline": "cifar10_train_baseline", "vgg16": "cifar10_finetune_vgg16"}
RETRIES = {
    "retries": 3,
    "retry_delay": timedelta(seconds=20),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
}
RECIPES = sorted({path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*/*.toml")})

RECIPE_PARAM = Param(
    None,
    type=["null", "string"],
    enum=[None, *RECIPES],
    title="Recipe",
    description="How to train (recipes/*/*.toml). Empty: what the triggering run asked for, else `report`.",
)
DATASET_PARAM = Param(
    None, type=["null", "string"], title="Dataset id", description="Empty: the triggering run's, else the newest."
)
TEST_LIMIT_PARAM = Param(
    None, type=["null", "integer"], minimum=100, title="Test images", description="Judge on so many; empty: on all."
)

NEW_LINEAGE_PARAM = Param(
    None,
    type=["null", "boolean"],
    title="New lineage",
    description="Let a model of this dataset replace a champion that was trained on another one.",
)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does the work; what trying again can mend is retried, everything else fails at once."""
    from ml.errors import CifarError, ServiceUnavailable, SourceUnreachable, StorageError

    try:
        return work()
    except (ServiceUnavailable, SourceUnreachable, StorageError):
        raise
    except CifarError as error:
        raise AirflowFailException(str(error)) from error


def request_of(context: Mapping[str, Any]) -> dict[str, Any]:
    """The triggering events' extras, later ones over earlier ones, and the form's values over both."""
    events = [event for found in (context.get("triggering_asset_events") or {}).values() for event in found]
    extras = [event.extra for event in sorted(events, key=lambda event: event.timestamp)]
    typed = {name: value for name, value in context["params"].items() if value is not None}
    return {name: value for extra in [*extras, typed] for name, value in extra.items()}
