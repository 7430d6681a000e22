"""Tells people about drift: a line in the log and, where one is set, a webhook that takes Slack's `{"text": ...}`.

Owns the words and the delivery. An alert is first committed as an undelivered row together with its window
(`ml.monitoring.windows`), then delivered, then marked: a crash or a receiver that is away delays it until the next
run and never loses it; a crash between delivery and mark delivers it twice.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from ml.monitoring.reference import SHOWN_NAMES
from ml.monitoring.statistics import DriftResult

logger = logging.getLogger(__name__)

LOG, WEBHOOK = "log", "webhook"
_ATTEMPTS = 3
_TIMEOUT = httpx.Timeout(5)


@dataclass(frozen=True)
class Alert:
    """An undelivered alert: the row's id, over which channel it goes, and its text."""

    id: int
    channel: str
    message: str


def alert_message(
    *,
    model: str,
    ids: tuple[int, int],
    drift: DriftResult,
    accuracy: str,
    report: str,
    next_step: str,
) -> str:
    """The alert's text.

    Args:
        model: name and version.
        ids: first and last id of the window's predictions.
        drift: what the test found.
        accuracy: what is known of the accuracy, in words.
        report: address of the window's report.
        next_step: what the system does now, in words.
    """
    columns = ", ".join(SHOWN_NAMES.get(name, name) for name in drift.drifted_columns)
    return (
        f"Drift: {model} no longer sees what it was made on. "
        f"Window: {drift.n_current} predictions, ids {ids[0]}-{ids[1]}; p = {drift.p_value:.2g} "
        f"(alarm at or below {drift.alpha:g}); drifted: {columns}. {accuracy} "
        f"Report: {report}. Next: {next_step}."
    )


def deliver(alert: Alert, *, webhook_url: str | None, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Delivers an alert over its channel; returns whether it arrived.

    A receiver that fails after three attempts is logged and never raises: the alert stays open for the next run.

    Args:
        alert: a row that nobody has received yet.
        webhook_url: None leaves webhook alerts open.
        sleep: replaces waiting between attempts.
    """
    if alert.channel == LOG:
        logger.warning("%s", alert.message)
        return True
    if webhook_url is None:
        return False
    with _address_kept_out_of_the_log(webhook_url), httpx.Client(timeout=_TIMEOUT, follow_redirects=False) as client:
        return _post(client, webhook_url, alert, sleep)


@contextmanager
def _address_kept_out_of_the_log(url: str) -> Iterator[None]:
    """httpx logs the whole address of each request at INFO."""

    def without_it(record: logging.LogRecord) -> bool:
        return url not in record.getMessage()

    chatter = logging.getLogger("httpx")
    chatter.addFilter(without_it)
    try:
        yield
    finally:
        chatter.removeFilter(without_it)


def _post(client: httpx.Client, url: str, alert: Alert, sleep: Callable[[float], None]) -> bool:
    """Whether the receiver took it. The address is a secret (it lets anyone post): only its host is logged."""
    host = _host(url)

    def before_sleep(state: RetryCallState) -> None:
        logger.info("Alert %d: %s did not take it (%s); trying again", alert.id, host, _cause(state))

    @retry(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential_jitter(initial=0.5, max=5),
        retry=retry_if_exception(_worth_retrying),
        before_sleep=before_sleep,
        reraise=True,
        sleep=sleep,
    )
    def attempt() -> None:
        client.post(url, json={"text": alert.message}).raise_for_status()

    try:
        attempt()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning(
            "Alert %d could not be delivered to the webhook at %s (%s); the next run tries again", alert.id, host,
            _describe(error),
        )  # fmt: skip
        return False
    logger.info("Alert %d delivered to the webhook at %s", alert.id, host)
    return True


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host or "an address without a host"
    except httpx.InvalidURL:
        return "an address that is none"


def _worth_retrying(error: BaseException) -> bool:
    """A refusal of the request itself (400-499 but 408 and 429) will be refused again; all else may pass."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, httpx.TransportError)


def _cause(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return _describe(error) if error else "no answer"


def _describe(error: BaseException) -> str:
    """What went wrong, without the address: httpx writes the whole of it into some messages."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__
