"""Delivery against a real receiver: retried, marked when taken, left open when not."""

import pytest

from ml.monitoring.alerts import LOG, WEBHOOK, Alert, deliver
from ml.monitoring.testing import webhook_receiver


@pytest.fixture
def receiver():
    with webhook_receiver() as running:
        yield running


def send(alert, url):
    """Delivers without waiting."""
    return deliver(alert, webhook_url=url, sleep=lambda _: None)


def test_both_channels_carry_the_text(receiver, caplog):
    assert send(Alert(1, LOG, "to the log"), receiver.url)
    assert send(Alert(2, WEBHOOK, "to the hook"), receiver.url)
    assert receiver.texts == ["to the hook"]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["to the log"]


def test_a_receiver_that_recovers_gets_it_once(receiver, caplog):
    caplog.set_level("INFO")
    receiver.answers = [503, 429]
    assert send(Alert(1, WEBHOOK, "drift"), receiver.url)
    assert (receiver.calls, receiver.texts) == (3, ["drift"])
    assert "trying again" in caplog.text
    assert "/hook" not in caplog.text  # whoever knows the address can post, and httpx would log it


@pytest.mark.parametrize(("status", "calls"), [(500, 3), (404, 1), (302, 1)])
def test_a_receiver_that_refuses_leaves_it_open(receiver, status, calls, caplog):
    receiver.answers = [status] * 3
    assert not send(Alert(1, WEBHOOK, "drift"), receiver.url)
    assert (receiver.calls, receiver.texts) == (calls, [])
    assert f"HTTP {status}" in caplog.text
    assert "/hook" not in caplog.text


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/secret", "secret", "http://", "http://127.0.0.1:x/secret", "http://[x/secret"]
)
def test_an_address_without_a_receiver_leaves_it_open(url, caplog):
    assert not send(Alert(1, WEBHOOK, "drift"), url)
    assert "could not be delivered" in caplog.text
    assert "secret" not in caplog.text


def test_without_a_webhook_set_its_alerts_wait():
    assert not send(Alert(1, WEBHOOK, "drift"), None)
    assert send(Alert(2, LOG, "drift"), None)
