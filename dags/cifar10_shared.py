"""What the five DAGs share: the assets that join them, how tasks retry, and how a request travels from DAG to DAG.

A request (dataset id, recipe, test limit, retraining id) rides on asset events as their `extra`; a value typed into
the trigger form wins over it. Ids travel, never data.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException

Result = TypeVar("Result")

DATASET = Asset("cifar10_dataset", uri="cifar10://dataset")
BASELINE_CANDIDATE = Asset("cifar10_baseline_candidate", uri="cifar10://candidate/baseline")
VGG16_CANDIDATE = Asset("cifar10_vgg16_candidate", uri="cifar10://candidate/vgg16")

TRAINERS = {"baseline": "cifar10_train_baseline", "vgg16": "cifar10_finetune_vgg16"}
TASK_DEFAULTS = {
    "retries": 3,
    "retry_delay": timedelta(seconds=20),
    "retry_exponential_backoff": 2,
    "max_retry_delay": timedelta(minutes=5),
    "execution_timeout": timedelta(minutes=5),
}


def settings_for(request: Mapping[str, Any]) -> Any:
    """The worker's settings, with what this run alone was asked for."""
    from ml.settings import load_settings

    names = {"weights": "vgg16_weights", "allow_stand_in": "mlops_allow_stand_in"}
    return load_settings(**{names[name]: value for name, value in request.items() if name in names})


def attempt(work: Callable[[], Result]) -> Result:
    """Does the work; what trying again can mend is retried, everything else fails at once."""
    from ml.errors import CifarError, ServiceUnavailable, SourceUnreachable, StorageError

    try:
        return work()
    except (ServiceUnavailable, SourceUnreachable, StorageError):
        raise
    except CifarError as error:
        raise AirflowFailException(str(error)) from error


def _events(context: Mapping[str, Any]) -> list[Any]:
    """The asset events that triggered the run, oldest first; none where a person did."""
    events = [event for found in (context.get("triggering_asset_events") or {}).values() for event in found]
    return sorted(events, key=lambda event: event.timestamp)


def request_of(context: Mapping[str, Any]) -> dict[str, Any]:
    """The triggering events' extras, later ones over earlier ones, and the form's values over both."""
    typed = {name: value for name, value in context["params"].items() if value is not None}
    extras = [event.extra for event in _events(context)]
    return {name: value for extra in [*extras, typed] for name, value in extra.items()}


def retrainings_of(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The extras of those triggering events whose candidate comes of a retraining."""
    return [event.extra for event in _events(context) if event.extra.get("retraining_id") is not None]
