"""Nothing is judged twice and nothing is stepped over: locks and late writers on a real PostgreSQL."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest

from ml.database import connect, transaction
from ml.errors import DatabaseUnavailable
from ml.monitoring import windows
from ml.monitoring.performance import LivePerformance
from ml.monitoring.windows import JudgedWindow, TrainingRequest, monitor_lock, settled_id, watermark

INSERT = (
    "INSERT INTO predictions (request_id, item_index, created_at, model_name, model_version, class_id, probabilities, "
    "brightness, contrast, sharpness, saturation, noise, image) VALUES (gen_random_uuid(), 0, now(), "
    "'cifar10-classifier', 1, 0, array_fill(0.1::real, ARRAY[10]), 0, 0, 0, 0, 0, decode(repeat('00', 3072), 'hex')) "
    "RETURNING id"
)
BASELINE = TrainingRequest("baseline", "ds-0123456789ab", "demo")
UNKNOWN = LivePerformance(labelled=0, correct=0, accuracy=None, interval=None, estimated_accuracy=None)


@pytest.fixture
def today(database_url):
    """The partition that INSERT needs, as a writer makes it."""
    with transaction(database_url) as connection:
        connection.cursor().execute("SELECT ensure_prediction_days(ARRAY[(now() AT TIME ZONE 'UTC')::date])")


def judged(ids, verdict="stable"):
    return JudgedWindow("cifar10-classifier", 1, ids, 5, verdict, None, UNKNOWN, None)


def test_a_slow_writers_lower_id_is_waited_for(database_url, today):
    slow, fast = connect(database_url), connect(database_url)
    try:
        with slow.cursor() as cursor:
            cursor.execute(INSERT)  # draws id 1, not committed yet
        with fast, fast.cursor() as cursor:
            cursor.execute(INSERT)  # id 2, seen at once
        with ThreadPoolExecutor(1) as pool:
            bound = pool.submit(settled_id, database_url)
            # Without the wait it would answer 2 here, the watermark would pass 1, and 1 would never be judged.
            assert not wait([bound], timeout=0.5).done
            slow.commit()
            assert bound.result(10) == 2
        with transaction(database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT array_agg(id ORDER BY id) FROM predictions WHERE id <= 2")
            assert cursor.fetchone() == ([1, 2],)
    finally:
        slow.close()
        fast.close()


def test_a_writer_that_never_ends_is_could_not_ask(database_url, today, monkeypatch):
    monkeypatch.setattr(windows, "_SETTLE_WAIT", "100ms")
    stuck = connect(database_url)
    try:
        stuck.cursor().execute(INSERT)
        with pytest.raises(DatabaseUnavailable, match="lock timeout"):
            settled_id(database_url)
    finally:
        stuck.close()
    assert settled_id(database_url) == 0  # the writer's row went with it


def test_one_monitor_at_a_time(database_url, monkeypatch):
    monkeypatch.setattr(windows, "_LOCK_WAIT", "100ms")
    with (
        monitor_lock(database_url),
        pytest.raises(DatabaseUnavailable, match="Another monitor"),
        monitor_lock(database_url),
    ):
        pass
    with monitor_lock(database_url):  # given back at the end of the block
        pass


def test_waiting_monitors_each_start_from_the_last_ones_watermark(database_url):
    first_in = threading.Event()
    seen = []

    def judge_five():
        with monitor_lock(database_url) as lock:
            first_in.set()
            after = watermark(database_url, "cifar10-classifier", 1)
            seen.append(after)
            with lock.writing() as cursor:
                windows.insert_window(cursor, judged((after + 1, after + 5)))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(judge_five) for _ in range(4)]:
            done.result(30)
    assert seen == [0, 5, 10, 15]


def test_a_lost_connection_writes_nothing_and_gives_the_lock_back(database_url):
    def judge_and_lose_the_connection():
        with monitor_lock(database_url) as lock, lock.writing() as cursor:
            windows.insert_window(cursor, judged((1, 5)))
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(DatabaseUnavailable, match="nothing was written"):
        judge_and_lose_the_connection()
    with monitor_lock(database_url):
        assert watermark(database_url, "cifar10-classifier", 1) == 0


def test_insufficient_windows_do_not_move_the_watermark(database_url):
    for ids, verdict in [((1, 5), "stable"), ((6, 8), "insufficient"), (None, "insufficient")]:
        with monitor_lock(database_url) as lock, lock.writing() as cursor:
            windows.insert_window(cursor, judged(ids, verdict))
    assert watermark(database_url, "cifar10-classifier", 1) == 5
    assert watermark(database_url, "cifar10-classifier", 2) == 0


def test_the_place_taken_by_somebody_else_is_not_taken_again(database_url):
    """The unique index has the last word, even where the history that was read did not show the other one."""
    now = datetime.now(UTC)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        window_id = windows.insert_window(cursor, judged((1, 5), "drift"))
    asked = {"window_id": window_id, "verdict": "drift", "request": BASELINE, "cooldown": timedelta(0)}
    with transaction(database_url) as connection, connection.cursor() as cursor:
        first = windows.decide_retraining(cursor, **asked, now=now)
    windows.mark_started(database_url, first.retraining_id)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        second = windows.decide_retraining(cursor, **asked, now=now + timedelta(seconds=1))
    assert first.decision.due
    assert first.retraining_id is not None
    assert (second.decision.due, second.retraining_id) == (False, None)
    assert "one is running since" in second.decision.reason
    with (
        pytest.raises(psycopg2.errors.UniqueViolation),
        transaction(database_url) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("INSERT INTO retrainings (window_id, architecture) VALUES (%s, 'vgg16')", (window_id,))


def test_a_claim_that_loses_the_race_hands_the_winners_on(database_url, monkeypatch):
    now = datetime.now(UTC)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        window_id = windows.insert_window(cursor, judged((1, 5), "drift"))
        cursor.execute("INSERT INTO retrainings (window_id, architecture) VALUES (%s, 'vgg16')", (window_id,))
    real, calls = windows._history, []

    def blind_at_first(cursor):
        calls.append(1)
        return [] if len(calls) <= 2 else real(cursor)

    monkeypatch.setattr(windows, "_history", blind_at_first)
    with transaction(database_url) as connection, connection.cursor() as cursor:
        late = windows.decide_retraining(
            cursor, window_id=window_id, verdict="drift", request=BASELINE, cooldown=timedelta(0), now=now
        )
    assert (late.decision.due, late.retraining_id) == (True, 1)
    assert late.request == TrainingRequest("vgg16", None, None)


def test_two_that_deliver_at_once_send_an_alert_once(database_url):
    with transaction(database_url) as connection, connection.cursor() as cursor:
        window_id = windows.insert_window(cursor, judged((1, 5), "drift"))
        windows.insert_alerts(cursor, window_id, "drift", ["webhook", "log"])
    sent = []

    def send_while_another_delivers(alert):
        sent.append(alert.channel)
        if alert.channel == "webhook":
            windows.deliver_alerts(database_url, lambda other: sent.append(f"other {other.channel}") or True)
        return True

    windows.deliver_alerts(database_url, send_while_another_delivers)
    assert sent == ["webhook", "other log"]
    windows.deliver_alerts(database_url, lambda alert: pytest.fail(f"{alert} was delivered before"))


def test_an_alert_that_did_not_arrive_stays_open_and_holds_up_no_other(database_url):
    with transaction(database_url) as connection, connection.cursor() as cursor:
        window_id = windows.insert_window(cursor, judged((1, 5), "drift"))
        windows.insert_alerts(cursor, window_id, "drift", ["webhook", "log"])
    windows.deliver_alerts(database_url, lambda alert: alert.channel == "log")
    left = []
    windows.deliver_alerts(database_url, lambda alert: left.append(alert.channel) or False)
    assert left == ["webhook"]
