"""How MLflow is asked: how long a call may take, and what its failures mean in this project's words.

Owns the limits and the translation of errors. What is asked is the business of its neighbours.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import requests
from mlflow.environment_variables import (
    MLFLOW_DISABLE_TELEMETRY,
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_BACKOFF_JITTER,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException, RestException
from mlflow.telemetry import get_telemetry_client, set_telemetry_client
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from ml.addresses import public_text, public_url
from ml.errors import ModelNotFound, RegistryError, RegistryUnavailable

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long one HTTP request to MLflow may take, in seconds, and how often it is repeated by MLflow's client."""

    timeout_seconds: int
    retries: int = 1
    """One: a pooled connection that the server has closed meanwhile fails once and is opened anew."""


QUICK = Limits(timeout_seconds=5)
"""For questions and small writes: a registry that does not answer is known within ten seconds."""
BULK = Limits(timeout_seconds=60)
"""For files: the server stores a whole upload before it answers."""

PATIENCE_SECONDS = 120.0
"""How long a write is repeated that must not be lost: a run's figures, a trained model."""

# Not BAD_REQUEST: MLflow answers so when its database breaks off in the middle of a query.
_REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_ALREADY_EXISTS",
        "INVALID_STATE",
        "RESOURCE_CONFLICT",
        "RESOURCE_LIMIT_EXCEEDED",
    }
)
_one_at_a_time = threading.RLock()


@contextmanager
def asking(address: str, limits: Limits = QUICK) -> Iterator[None]:
    """Bounds what is asked of MLflow inside the block, and translates its failures.

    MLflow's client takes its limits from the process's environment at each request (its defaults add up to four
    minutes and more). They are set here, for the length of the block, and put back; since that is one value for the
    whole process, blocks of several threads run one after the other.

    Raises:
        ModelNotFound: MLflow answered that there is no such thing.
        RegistryError: MLflow answered and refused.
        RegistryUnavailable: no answer, an answer that is not MLflow's, or a failure inside the server.
    """
    with _one_at_a_time, _environment(limits):
        try:
            yield
        except MlflowException as error:
            raise _translate(address, error) from error
        except requests.RequestException as error:
            raise unavailable(address, error) from error


@contextmanager
def _environment(limits: Limits) -> Iterator[None]:
    wanted = {
        MLFLOW_HTTP_REQUEST_TIMEOUT: limits.timeout_seconds,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES: limits.retries,
        MLFLOW_HTTP_REQUEST_BACKOFF_JITTER: 0.2,
        # A 503 may ask for minutes of waiting: how long to wait is decided here.
        MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER: False,
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR: False,
        # Standard output belongs to the commands' `--json`.
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: True,
    }
    # MLflow reports its use to its makers unless told otherwise, and has begun to when it is imported. For good.
    MLFLOW_DISABLE_TELEMETRY.set(True)
    if get_telemetry_client() is not None:
        set_telemetry_client()
    before = {variable: variable.get_raw() for variable in wanted}
    for variable, value in wanted.items():
        variable.set(value)
    try:
        yield
    finally:
        for variable, raw in before.items():
            if raw is None:
                variable.unset()
            else:
                variable.set(raw)


def unavailable(address: str, error: Exception) -> RegistryUnavailable:
    """The error for 'could not ask', with what was seen."""
    return RegistryUnavailable(
        f"MLflow at {public_url(address)} could not be asked: {_first_line(error)}.",
        fix="see that it runs (`make up`) and that MLFLOW_TRACKING_URI names it, then try again.",
    )


def _translate(address: str, error: MlflowException) -> Exception:
    # Only a JSON body with MLflow's own error code is MLflow's answer: a 404 page of some other server at that
    # address must never be taken for "there is none".
    if isinstance(error, RestException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return ModelNotFound(
            f"MLflow at {public_url(address)} has no such thing: {_first_line(error)}.",
            fix="see `cifar10 status` for what is registered.",
        )
    if error.error_code in _REFUSALS:
        return RegistryError(
            f"MLflow at {public_url(address)} refused: {_first_line(error)}.",
            fix="correct what the message names; see the MLflow UI for the state of the registry.",
        )
    return unavailable(address, error)


def _first_line(error: Exception) -> str:
    text = public_text(str(error)).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:500]


def patiently(call: Callable[[], T], *, what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """Repeats `call` while MLflow cannot be asked, for about `seconds`, with growing pauses of at most ten seconds.

    For writes whose loss would waste a training: MLflow or its database may be away for a minute. `call` must be safe
    to repeat, for its answer may be what was lost.

    Raises:
        RegistryUnavailable: when it still cannot be asked after that.
        Exception: whatever else `call` raises, at once.
    """

    def report(state: RetryCallState) -> None:
        pause = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: %s Trying again in %.1f s.", what, getattr(error, "message", error), pause)

    retrying = Retrying(
        retry=retry_if_exception_type(RegistryUnavailable),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.5, max=10),
        before_sleep=report,
        reraise=True,
    )
    return retrying(call)
