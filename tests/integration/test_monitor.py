"""The monitor's workflow on a real PostgreSQL: verdicts, watermarks, alerts, retrainings, and what a failure leaves."""

import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg2.extras
import pytest
from pydantic import SecretStr

from ml.database import transaction
from ml.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InputInvalid,
    ModelInvalid,
    ModelNotFound,
    RegistryUnavailable,
)
from ml.evaluation.golden import write_golden
from ml.monitoring.gaps import Gap, insert_gaps
from ml.monitoring.reference import STATISTIC_NAMES, write_reference
from ml.monitoring.testing import FakeRegistry, FakeVersion, webhook_receiver
from ml.monitoring.windows import monitor_lock
from ml.registry import tracking
from ml.registry.packaging import register
from ml.registry.versions import Registry
from ml.workflows.monitor import finish_retraining, monitor, monitor_champion, start_retraining
from tests.tiny_models import make_onnx
from tests.tiny_versions import STAND_IN, Files, empty_registry, small_dataset

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now

    def pass_minutes(self, minutes):
        self.now += timedelta(minutes=minutes)


def predictions(n, seed, brightness=0.5):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(10, 0.3), n).astype(np.float32)
    statistics = {name: generator.normal(0.5, 0.1, n).astype(np.float32) for name in STATISTIC_NAMES}
    statistics["brightness"] += np.float32(brightness - 0.5)
    return probabilities, statistics


def insert(url, n, seed, *, brightness=0.5, version=1, right=None):
    """Logs `n` predictions as the server does; with `right`, feedback that agrees with that many of them."""
    probabilities, statistics = predictions(n, seed, brightness)
    request = str(uuid.uuid4())
    rows = [
        (
            *(request, i, datetime.now(UTC), "cifar10-classifier", version, int(probabilities[i].argmax())),
            probabilities[i].tolist(),
            *(float(statistics[name][i]) for name in STATISTIC_NAMES),
            bytes(3072),
        )
        for i in range(n)
    ]
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT ensure_prediction_days(ARRAY[%s])", (rows[0][2].date(),))
        cursor.execute("INSERT INTO requests VALUES (%s, %s, %s)", (request, rows[0][2], n))
        psycopg2.extras.execute_values(
            cursor,
            "INSERT INTO predictions (request_id, item_index, created_at, model_name, model_version, class_id, "
            f"probabilities, {', '.join(STATISTIC_NAMES)}, image) VALUES %s",
            rows,
        )
        if right is not None:
            labels = [(request, i, row[5] if i < right else (row[5] + 1) % 10) for i, row in enumerate(rows)]
            psycopg2.extras.execute_values(
                cursor, "INSERT INTO feedback (request_id, item_index, label) VALUES %s", labels
            )


def rows(url, query):
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(tmp_path):
    probabilities, statistics = predictions(3000, seed=99)
    labels = probabilities.argmax(axis=1)
    write_reference(tmp_path / "model" / "artifacts" / "reference.parquet", labels, probabilities, statistics)
    return FakeRegistry(tmp_path / "model")


@pytest.fixture
def watched(settings, database_url):
    update = {"mlops_database_url": SecretStr(database_url), "reports_public_url": "https://reports.example"}
    return settings.model_copy(update=update)


def test_too_few_predictions_are_insufficient_and_wait_for_more(watched, registry, database_url):
    empty = monitor_champion(watched, registry)
    assert (empty["verdict"], empty["p_value"], empty["n"]) == ("insufficient", None, 0)
    insert(database_url, 60, seed=1)
    few = monitor_champion(watched, registry)
    assert (few["verdict"], few["p_value"], few["n"], few["alert"]) == ("insufficient", None, 60, False)
    assert few["report"] == {"html": None, "json": None, "url": None}
    insert(database_url, 60, seed=2)
    enough = monitor_champion(watched, registry)
    assert (enough["verdict"], enough["n"]) == ("stable", 120)
    assert monitor_champion(watched, registry)["n"] == 0
    written = rows(database_url, "SELECT verdict, n, first_id, last_id, p_value FROM monitor_windows ORDER BY id")
    assert [row[:4] for row in written] == [
        ("insufficient", 0, None, None),
        ("insufficient", 60, 1, 60),
        ("stable", 120, 1, 120),
        ("insufficient", 0, None, None),
    ]
    assert [row[4] is None for row in written] == [True, True, False, True]


def test_the_reference_is_that_of_the_form_that_serves(watched, registry, database_url):
    probabilities, statistics = predictions(3000, seed=99, brightness=0.6)
    labels, int8 = probabilities.argmax(axis=1), registry.folder / "artifacts" / "reference.int8.parquet"
    write_reference(int8, labels, probabilities, statistics)
    insert(database_url, 300, seed=1, brightness=0.6)
    registry.champion = replace(registry.champion, tags={**registry.champion.tags, "engine": "int8"})
    assert monitor_champion(watched, registry)["verdict"] == "stable"
    insert(database_url, 300, seed=2, brightness=0.6)
    registry.champion = replace(registry.champion, tags={**registry.champion.tags, "engine": "fp32"})
    assert monitor_champion(watched, registry)["verdict"] == "drift"


def test_drift_is_reported_alerted_and_asks_for_one_retraining(watched, registry, database_url, clock, caplog):
    insert(database_url, 300, seed=1, brightness=0.6, right=120)
    result = monitor_champion(watched, registry, clock=clock)
    assert json.loads(json.dumps(result)) == result
    assert result["verdict"] == "drift"
    assert result["p_value"] <= 0.01
    assert result["drifted_columns"] == ["brightness"]
    assert (result["live_accuracy"], result["labelled"]) == (0.4, 300)
    assert result["accuracy_interval"][0] < 0.4 < result["accuracy_interval"][1]
    retraining = result["retraining"]
    assert (retraining["due"], retraining["architecture"]) == (True, "baseline")
    assert (retraining["dataset_id"], retraining["recipe"]) == ("ds-0123456789ab", "demo")
    assert "cifar10_monitor starts it" in retraining["reason"]
    assert result["alert"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert result["report"]["url"].startswith("https://reports.example/")
    for part in ("cifar10-classifier v1", "ids 1-300", "p = ", "brightness", result["report"]["url"], "0.400"):
        assert part in warnings[0]
    assert f"retraining {result['retraining']['retraining_id']} of baseline" in warnings[0]
    assert rows(database_url, "SELECT channel, delivered_at IS NOT NULL FROM alerts") == [("log", True)]

    shown = json.loads((watched.reports_dir / "windows" / "v0001-0000000001-0000000300.json").read_text())
    failed = [test["name"] for test in shown["tests"] if test["status"] == "FAIL"]
    assert failed == ["Value Drift for column brightness"]

    # A second drifted window while the first retraining runs, in the cool-down, and after it.
    start_retraining(watched, retraining["retraining_id"])
    insert(database_url, 300, seed=2, brightness=0.6)
    running = monitor_champion(watched, registry, clock=clock)["retraining"]
    assert (running["due"], running["retraining_id"]) == (False, None)
    assert "one is running since" in running["reason"]
    finish_retraining(watched, result["retraining"]["retraining_id"], "success")
    clock.pass_minutes(359)
    insert(database_url, 300, seed=3, brightness=0.6)
    cooling = monitor_champion(watched, registry, clock=clock)["retraining"]
    assert not cooling["due"]
    assert "cool-down until 2026-01-01 18:00:00+00:00" in cooling["reason"]
    clock.pass_minutes(1)
    insert(database_url, 300, seed=4, brightness=0.6)
    assert monitor_champion(watched, registry, clock=clock)["retraining"]["due"]
    assert rows(database_url, "SELECT outcome FROM retrainings ORDER BY id") == [("success",), (None,)]


def test_a_retraining_of_which_nothing_is_heard_does_not_lock_the_loop(watched, registry, database_url, clock):
    insert(database_url, 300, seed=1, brightness=0.6)
    first = monitor_champion(watched, registry, clock=clock)["retraining"]["retraining_id"]
    start_retraining(watched, first)
    clock.now = datetime.now(UTC) + timedelta(hours=49)
    insert(database_url, 300, seed=2, brightness=0.6)
    second = monitor_champion(watched, registry, clock=clock)["retraining"]
    assert second["due"]
    assert rows(database_url, "SELECT outcome FROM retrainings ORDER BY id") == [("lost",), (None,)]
    finish_retraining(watched, first, "success")  # it was alive after all
    finish_retraining(watched, second["retraining_id"], "failed")
    finish_retraining(watched, second["retraining_id"], "success")  # said twice: the first word stands
    assert rows(database_url, "SELECT outcome FROM retrainings ORDER BY id") == [("success",), ("failed",)]
    for call in (lambda: finish_retraining(watched, 77, "success"), lambda: start_retraining(watched, 77)):
        with pytest.raises(InputInvalid, match="No retraining has the id 77"):
            call()


def test_a_retraining_that_nobody_started_is_handed_on_as_it_was_asked_for(watched, registry, database_url, clock):
    insert(database_url, 300, seed=1, brightness=0.6)
    asked = monitor_champion(watched, registry, clock=clock)["retraining"]
    # Whoever asked died; meanwhile another model became champion, and there is nothing new to judge.
    registry.champion = FakeVersion(version=2, architecture="vgg16", dataset_id="ds-another", tags={"recipe": "report"})
    clock.pass_minutes(60)
    for _ in range(2):
        handed_on = monitor_champion(watched, registry, clock=clock)
        assert (handed_on["verdict"], handed_on["alert"]) == ("insufficient", False)
        again = handed_on["retraining"]
        assert {**again, "reason": ""} == {**asked, "reason": ""}
        assert f"retraining {asked['retraining_id']} was asked for at 2026-01-01 12:00" in again["reason"]
    start_retraining(watched, asked["retraining_id"])
    started_at = rows(database_url, "SELECT started_at FROM retrainings")
    start_retraining(watched, asked["retraining_id"])  # its task is tried again
    assert rows(database_url, "SELECT started_at FROM retrainings") == started_at
    later = monitor_champion(watched, registry, clock=clock)["retraining"]
    assert (later["due"], later["architecture"], later["retraining_id"]) == (False, "vgg16", None)


def test_a_champion_that_does_not_say_how_it_was_trained_leaves_that_open(watched, registry, database_url):
    registry.champion = FakeVersion(dataset_id="", tags={})
    insert(database_url, 300, seed=1, brightness=0.6)
    retraining = monitor_champion(watched, registry)["retraining"]
    assert (retraining["due"], retraining["dataset_id"], retraining["recipe"]) == (True, None, None)


def test_no_other_monitor_waits_for_a_slow_receiver(watched, registry, database_url, monkeypatch):
    monkeypatch.setattr("ml.monitoring.windows._LOCK_WAIT", "100ms")
    insert(database_url, 300, seed=1, brightness=0.6)
    seen = []

    def slow(alert, **_):
        with monitor_lock(database_url):
            seen.append(alert.channel)
        return True

    monkeypatch.setattr("ml.monitoring.alerts.deliver", slow)
    monitor_champion(watched, registry)
    assert seen == ["log"]


def test_versions_have_watermarks_of_their_own(watched, registry, database_url):
    insert(database_url, 150, seed=1)
    insert(database_url, 150, seed=2, version=2)
    assert monitor_champion(watched, registry)["n"] == 150
    registry.champion = FakeVersion(version=2)
    assert monitor_champion(watched, registry)["n"] == 150
    registry.champion = FakeVersion(version=1)
    assert monitor_champion(watched, registry)["n"] == 0


def test_a_long_queue_is_judged_oldest_first_window_by_window(watched, registry, database_url, caplog):
    caplog.set_level("INFO")
    small = watched.model_copy(update={"monitor_max_predictions": 200})
    insert(database_url, 500, seed=1)
    assert [monitor_champion(small, registry)["n"] for _ in range(3)] == [200, 200, 100]
    assert "300 newer predictions wait" in caplog.text
    spans = rows(database_url, "SELECT first_id, last_id FROM monitor_windows ORDER BY id")
    assert spans == [(1, 200), (201, 400), (401, 500)]


def test_labels_that_come_late_reach_their_window(watched, registry, database_url):
    insert(database_url, 150, seed=1)
    assert monitor_champion(watched, registry)["live_accuracy"] is None
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO feedback (request_id, item_index, label) "
            "SELECT request_id, item_index, CASE WHEN id <= 75 THEN class_id ELSE (class_id + 1) % 10 END "
            "FROM predictions WHERE id <= 100"
        )
    monitor_champion(watched, registry)
    late = rows(database_url, "SELECT labelled, live_accuracy FROM monitor_windows ORDER BY id LIMIT 1")
    assert late == [(100, 0.75)]


def test_a_crash_before_the_verdict_leaves_the_predictions_to_the_next_run(
    watched, registry, database_url, monkeypatch
):
    insert(database_url, 300, seed=1, brightness=0.6)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ml.monitoring.windows.insert_alerts", crash)  # the last statement of the transaction
        with pytest.raises(KeyboardInterrupt):
            monitor_champion(watched, registry)
    assert rows(database_url, "SELECT count(*) FROM monitor_windows") == [(0,)]
    assert rows(database_url, "SELECT count(*) FROM retrainings") == [(0,)]
    again = monitor_champion(watched, registry)
    assert (again["verdict"], again["n"], again["retraining"]["due"]) == ("drift", 300, True)
    snapshots = list((watched.reports_dir / "workspace").glob("*/snapshots/*"))
    assert len(snapshots) == 1  # the repeated run replaced its own report


def test_a_failing_webhook_delays_the_alert_and_nothing_else(watched, registry, database_url):
    insert(database_url, 300, seed=1, brightness=0.6)
    with webhook_receiver() as receiver:
        alerted = watched.model_copy(update={"alert_webhook_url": SecretStr(receiver.url)})
        receiver.answers = [404]
        assert monitor_champion(alerted, registry)["verdict"] == "drift"
        delivered = "SELECT channel, delivered_at IS NOT NULL FROM alerts ORDER BY id"
        assert rows(database_url, delivered) == [("log", True), ("webhook", False)]
        assert monitor_champion(alerted, registry)["verdict"] == "insufficient"
        assert rows(database_url, delivered) == [("log", True), ("webhook", True)]
        assert len(receiver.texts) == 1
        assert "brightness" in receiver.texts[0]
        monitor_champion(alerted, registry)
        assert receiver.calls == 2


def test_with_a_real_registry(watched, mlflow_uri, database_url, tmp_path):
    here = watched.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    empty_registry(mlflow_uri)
    with pytest.raises(ModelNotFound, match="no champion"):
        monitor(here)
    manifest = small_dataset(here)
    probabilities, statistics = predictions(2000, seed=99)
    work = tmp_path / "whole"
    reference = write_reference(work / "reference.parquet", probabilities.argmax(axis=1), probabilities, statistics)
    files = Files(work / "model.keras", make_onnx(work / "model.onnx"))
    files.keras.write_bytes(b"stands for a Keras file")
    with tracking.run(here, "watched") as run:
        version = register(
            run,
            exported=files,
            metrics={"validation_accuracy": 0.5, "validation_loss": 1.0},
            recipe={"name": "tiny", "seed": 1},
            manifest=manifest,
            weights="RANDOM WEIGHTS",
            reference=reference,
            golden=write_golden(work / "golden.npz", STAND_IN),
            int8="none",
            card="# Watched\n",
            input_example=np.zeros((2, 32, 32, 3), dtype=np.uint8),
            data=manifest.data,
            architecture="vgg16",
        )
    Registry(mlflow_uri).set_alias("champion", version.version)
    insert(database_url, 200, seed=1, brightness=0.6, version=version.version)
    result = monitor(here, min_predictions=150)
    assert (result["verdict"], result["n"], result["drifted_columns"]) == ("drift", 200, ["brightness"])
    assert result["model"] == {"name": "cifar10-classifier", "version": version.version}
    retraining = result["retraining"]
    assert (retraining["architecture"], retraining["recipe"]) == ("vgg16", "tiny")
    assert retraining["dataset_id"] == manifest.dataset_id


def test_what_could_not_be_asked_raises_and_writes_nothing(watched, registry, database_url, settings):
    insert(database_url, 300, seed=1)
    registry.failure = RegistryUnavailable("MLflow could not be asked.", fix="start it.")
    with pytest.raises(RegistryUnavailable):
        monitor_champion(watched, registry)
    with pytest.raises(RegistryUnavailable):
        monitor(watched)  # the real registry, at an address where nobody answers
    registry.failure = None
    registry.champion = None
    with pytest.raises(ModelNotFound, match="no champion"):
        monitor_champion(watched, registry)
    registry.champion = FakeVersion()
    nowhere = watched.model_copy(update={"mlops_database_url": SecretStr("postgresql://x@127.0.0.1:9/x")})
    with pytest.raises(DatabaseUnavailable):
        monitor_champion(nowhere, registry)
    (registry.folder / "artifacts" / "reference.parquet").write_bytes(b"not a reference")
    with pytest.raises(ModelInvalid, match="Not a reference"):
        monitor_champion(watched, registry)
    with pytest.raises(ConfigurationError, match="at least 3000 predictions"):
        monitor_champion(watched, registry, min_predictions=3000)
    assert rows(database_url, "SELECT count(*) FROM monitor_windows") == [(0,)]
    assert not watched.reports_dir.exists()


def test_what_a_log_lost_is_told_once_and_what_is_too_old_goes(watched, registry, database_url, caplog):
    old = datetime.now(UTC) - timedelta(days=watched.prediction_retention_days + 1)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        insert_gaps(cursor, [Gap(str(uuid.uuid4()), "Prediction log", START, START, 41, "the spool is full")])
        cursor.execute("SELECT ensure_prediction_days(ARRAY[%s])", (old.date(),))
        cursor.execute("INSERT INTO requests VALUES (gen_random_uuid(), %s, 1)", (old,))
    for _ in range(2):
        result = monitor_champion(watched, registry)
        assert (result["verdict"], result["alert"]) == ("insufficient", False)
    told = rows(database_url, "SELECT message, channel, delivered_at IS NOT NULL FROM alerts")
    assert [row[1:] for row in told] == [("log", True)]
    assert "Prediction log: 41 rows are missing from 2026-01-01 12:00:00" in told[0][0]
    assert sum("41 rows are missing" in record.message for record in caplog.records) == 1
    assert rows(database_url, "SELECT count(*) FROM requests") == [(0,)]


def test_a_verdict_stands_though_nothing_could_be_removed(watched, registry, database_url, monkeypatch, caplog):
    def refuse(*_, **__):
        raise DatabaseUnavailable("A backup reads.", fix="wait.")

    monkeypatch.setattr("ml.workflows.retain.remove_old", refuse)
    insert(database_url, 120, seed=1)
    assert monitor_champion(watched, registry)["verdict"] == "stable"
    assert any("Old predictions stay" in record.message for record in caplog.records)
