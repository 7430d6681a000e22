"""The prediction log against a real PostgreSQL, which also goes away and comes back."""

import logging
import threading
from datetime import UTC, datetime
from uuid import uuid4

import numpy as np
import pytest

from ml.database import transaction
from ml.errors import DatabaseUnavailable, InputInvalid, PredictionNotFound
from ml.monitoring.image_statistics import STATISTIC_NAMES, image_statistics
from ml.monitoring.prediction_log import (
    NO_LABEL,
    WRITERS_TAKE_TURNS,
    LoggedPrediction,
    PredictionLog,
    read_window,
    record_feedback,
)
from ml.stack.migrations import migrate
from tests.conftest import PostgresProcess

NOBODY = "postgresql://x@127.0.0.1:9/x"


def prediction(n=1, *, version=1, seed=0, request_id=None):
    draw = np.random.default_rng(seed)
    return LoggedPrediction(
        request_id=request_id or uuid4(),
        created_at=datetime.now(UTC),
        model_name="cifar10-classifier",
        model_version=version,
        probabilities=draw.dirichlet(np.ones(10), n).astype(np.float32),
        images=draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
    )


@pytest.fixture
def log(database_url, tmp_path):
    opened = PredictionLog(database_url, tmp_path)
    opened.start()
    yield opened
    opened.close()


def rows(url, query="SELECT count(*) FROM predictions"):
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def stored(url):
    """The requests in the order in which their rows got their ids, with how many rows each has."""
    return rows(url, "SELECT request_id, count(*) FROM predictions GROUP BY request_id ORDER BY min(id)")


def test_what_is_logged_is_read_back(log, database_url):
    sent = prediction(3)
    assert log.append(sent)
    assert log.flush()
    window = read_window(database_url, 1, 0, 100)
    assert len(window) == 3
    assert (np.diff(window.ids) > 0).all()
    np.testing.assert_array_equal(window.class_ids, sent.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(window.probabilities, sent.probabilities)
    assert tuple(window.statistics) == STATISTIC_NAMES
    for name, values in image_statistics(sent.images).items():
        np.testing.assert_allclose(window.statistics[name], values, rtol=1e-6)
    assert window.labels.tolist() == [NO_LABEL] * 3
    (first,) = rows(database_url, "SELECT request_id, item_index, created_at, image FROM predictions LIMIT 1")
    assert first[0] == str(sent.request_id)
    assert first[2] == sent.created_at
    assert bytes(first[3]) == sent.images[first[1]].tobytes()


def test_a_row_is_written_without_anyone_asking(log, database_url):
    log.append(prediction())
    deadline = threading.Event()
    for _ in range(200):
        if rows(database_url) == [(1,)]:
            return
        deadline.wait(0.05)
    pytest.fail("nothing was written in ten seconds")


def test_a_window_starts_after_its_watermark_and_holds_one_version(log, database_url):
    for seed, version in enumerate([1, 2, 1, 1, 2]):
        log.append(prediction(2, version=version, seed=seed))
    assert log.flush()
    first = read_window(database_url, 1, 0, 4)
    rest = read_window(database_url, 1, int(first.ids[-1]), 100)
    assert (len(first), len(rest)) == (4, 2)
    assert set(first.ids.tolist()).isdisjoint(rest.ids.tolist())
    assert len(read_window(database_url, 2, 0, 100)) == 4
    empty = read_window(database_url, 9, 0, 100)
    assert len(empty) == 0
    assert empty.probabilities.shape == (0, 10)


def test_the_same_request_twice_is_kept_once(log, database_url):
    same = prediction(2)
    for _ in range(3):
        log.append(same)
    assert log.flush()
    assert rows(database_url) == [(2,)]


def test_many_threads_lose_nothing_and_ids_are_unique(log, database_url):
    def work(seed):
        for k in range(40):
            log.append(prediction(2, seed=seed * 100 + k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.flush(30)
    assert rows(database_url) == [(640,)]
    assert log.state().written == 640
    assert log.state().queued == log.state().dropped == 0


def test_feedback_is_kept_replaced_and_read(log, database_url):
    sent = prediction(2)
    log.append(sent)
    log.flush()
    assert record_feedback(database_url, sent.request_id, 1, 7) is True
    assert record_feedback(database_url, sent.request_id, 1, 3) is False
    assert read_window(database_url, 1, 0, 10).labels.tolist() == [NO_LABEL, 3]


def test_feedback_right_after_the_prediction_finds_it(database_url, tmp_path):
    log = PredictionLog(database_url, tmp_path, flush_every=60)  # would not write in time by itself
    log.start()
    sent = prediction()
    log.append(sent)
    assert log.record_feedback(sent.request_id, 0, 5) is True
    log.close()
    assert read_window(database_url, 1, 0, 10).labels.tolist() == [5]


@pytest.mark.parametrize("index", [0, 1, 32767, 10**12])
def test_feedback_on_nothing_is_not_found(log, index):
    with pytest.raises(PredictionNotFound, match="request_id"):
        log.record_feedback(uuid4(), index, 1)


@pytest.mark.parametrize("label", [-1, 10])
def test_feedback_with_a_wrong_label_is_refused(log, label):
    with pytest.raises(InputInvalid, match="0-9"):
        log.record_feedback(uuid4(), 0, label)


def test_nothing_is_lost_while_postgresql_is_away(tmp_path_factory, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    # One of its own: the shared one also carries MLflow.
    postgres = PostgresProcess(tmp_path_factory.mktemp("outage") / "data")
    database_url = postgres.new_database("predictions")
    migrate(database_url)
    log = PredictionLog(database_url, tmp_path, longest_pause=0.2)
    log.start()
    log.append(prediction(5))
    assert log.flush()
    postgres.stop()
    try:
        kept = [prediction(10, seed=seed) for seed in range(100)]
        assert all(log.append(item) for item in kept)
        assert not log.flush(0.5)
        state = log.state()
        assert (state.queued, state.dropped, state.database_ok, state.spool_ok) == (1000, 0, False, True)
        assert state.spool_bytes > 1000 * 3072
        with pytest.raises(DatabaseUnavailable):
            log.record_feedback(kept[0].request_id, 0, 1)
        # Still away: another process opens the same folder, and the first one ends.
        log.close(timeout=0.2)
        log = PredictionLog(database_url, tmp_path, longest_pause=0.2)
        log.start()
        later = prediction(3)
        assert log.append(later)
    finally:
        postgres.start()
    assert log.flush(20)
    assert stored(database_url)[1:] == [(str(item.request_id), len(item.images)) for item in (*kept, later)]
    assert log.record_feedback(kept[0].request_id, 0, 1) is True
    state = log.state()
    assert (state.queued, state.written, state.dropped, state.database_ok) == (0, 1003, 0, True)
    log.close()
    postgres.stop()
    told = [r.message for r in caplog.records if r.name == "ml.monitoring.prediction_log"]
    assert sum("Keeping up to" in line for line in told) == 2  # once for each of the two
    assert any("is back" in line for line in told)
    assert list(tmp_path.iterdir()) == []


def test_a_schema_that_comes_later_loses_nothing(postgres, tmp_path):
    url = postgres.new_database("predictions_late")
    log = PredictionLog(url, tmp_path, longest_pause=0.2)
    log.start()
    log.append(prediction(4))
    assert not log.flush(0.5)
    migrate(url)
    assert log.flush(20)
    assert rows(url) == [(4,)]
    log.close()


def test_writers_take_turns_so_that_no_watermark_can_step_over_a_slower_one(log, database_url):
    with transaction(database_url) as slower:
        slower.cursor().execute(WRITERS_TAKE_TURNS)
        log.append(prediction())
        assert not log.flush(0.5)
        assert rows(database_url) == [(0,)]
    assert log.flush()
    assert rows(database_url) == [(1,)]


def test_rows_that_can_never_be_written_do_not_hold_up_the_next(log, database_url):
    with transaction(database_url) as connection:
        connection.cursor().execute("ALTER TABLE predictions ADD CHECK (model_version <> 13)")
    log.append(prediction(2, version=13))
    assert log.flush()
    log.append(prediction(3))
    assert log.flush()
    assert rows(database_url) == [(3,)]
    assert (log.state().refused, log.state().dropped) == (2, 0)


def test_closing_writes_what_is_queued(database_url, tmp_path):
    log = PredictionLog(database_url, tmp_path, flush_every=60)
    log.start()
    log.append(prediction(7))
    log.close()
    assert rows(database_url) == [(7,)]
    assert not log.append(prediction())
    assert log.state().dropped == 1


def test_closing_without_a_database_ends_and_leaves_all_to_the_next(database_url, tmp_path):
    log = PredictionLog(NOBODY, tmp_path, longest_pause=0.1)
    log.start()
    sent = prediction(7)
    log.append(sent)
    log.close(timeout=0.5)
    state = log.state()
    assert (state.written, state.dropped) == (0, 0)
    assert not any(t.name == "prediction-log" and t.is_alive() for t in threading.enumerate())
    following = PredictionLog(database_url, tmp_path)
    following.start()
    assert following.flush()
    following.close()
    assert stored(database_url) == [(str(sent.request_id), 7)]


def test_reading_without_a_database_is_could_not_ask():
    with pytest.raises(DatabaseUnavailable):
        read_window(NOBODY, 1, 0, 10)


@pytest.mark.parametrize(
    "wrong",
    [{"images": np.zeros((1, 28, 28, 3), np.uint8)}, {"probabilities": np.zeros((2, 10), np.float32)}],
)
def test_a_record_of_the_wrong_shape_cannot_be_made(wrong):
    good = prediction()
    fields = {name: getattr(good, name) for name in LoggedPrediction.__dataclass_fields__}
    with pytest.raises(ValueError, match="must be"):
        LoggedPrediction(**{**fields, **wrong})
