"""The shadow log against a real PostgreSQL, which also goes away and comes back."""

import threading
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import numpy as np
import psycopg2
import pytest

from ml.database import transaction
from ml.errors import DatabaseUnavailable
from ml.monitoring.shadow_log import ShadowLog, read_shadow
from ml.traffic import Mirrored
from tests.conftest import PostgresProcess

NOBODY = "postgresql://x@127.0.0.1:9/x"
START = datetime(2026, 11, 23, 12, tzinfo=UTC)


def mirrored(n=1, *, seed=0, after=0.0, champion=1, challenger=2, failure=None):
    """One request of `n` images, `after` seconds from START."""
    draw = np.random.default_rng(seed)
    return Mirrored(
        request_id=uuid4(),
        created_at=START + timedelta(seconds=after),
        champion_version=champion,
        challenger_version=challenger,
        champion_classes=draw.integers(0, 10, n),
        champion_ms=float(draw.uniform(1, 5)),
        probabilities=None if failure else draw.dirichlet(np.ones(10), n).astype(np.float32),
        challenger_ms=None if failure else float(draw.uniform(1, 9)),
        failure=failure,
    )


def drawn(requests=40):
    """Requests of one to four images, one a second; every seventh failed."""
    return [mirrored(1 + k % 4, seed=k, after=k, failure="it broke" if k % 7 == 0 else None) for k in range(requests)]


@pytest.fixture
def log(database_url, tmp_path):
    opened = ShadowLog(database_url, tmp_path)
    opened.start()
    yield opened
    opened.close()


def rows(url, query="SELECT count(*) FROM shadow_predictions"):
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def assert_holds(shadow, items):
    """What was read, against numpy over what was mirrored."""
    answered = [item for item in items if item.failure is None]
    differ = [item.probabilities.argmax(axis=1) != item.champion_classes for item in answered]
    assert shadow.n == sum(len(item.champion_classes) for item in items)
    assert shadow.disagreements == np.concatenate(differ).sum()
    assert shadow.failures == sum(len(item.champion_classes) for item in items if item.failure is not None)
    np.testing.assert_array_equal(shadow.champion_ms, [item.champion_ms for item in answered])
    np.testing.assert_array_equal(shadow.challenger_ms, [item.challenger_ms for item in answered])
    assert shadow.champion_ms.dtype == shadow.challenger_ms.dtype == np.float64


def test_exactly_what_was_mirrored_is_read_back(log, database_url):
    items = drawn()
    for item in reversed(items):  # the order is that of the answers, not of the writing
        assert log.append(item)
    assert log.flush()
    assert_holds(read_shadow(database_url, 1, 2, START), items)
    stored = rows(
        database_url,
        "SELECT request_id, item_index, created_at, champion_class, challenger_class, challenger_probabilities, failure"
        " FROM shadow_predictions ORDER BY created_at, item_index",
    )
    wanted = [
        (
            str(item.request_id),
            index,
            item.created_at,
            int(item.champion_classes[index]),
            None if item.failure else int(item.probabilities[index].argmax()),
            None if item.failure else item.probabilities[index].tolist(),
            item.failure,
        )
        for item in items
        for index in range(len(item.champion_classes))
    ]
    np.testing.assert_equal([row[:5] + row[6:] for row in stored], [row[:5] + row[6:] for row in wanted])
    for read, sent in zip(stored, wanted, strict=True):
        np.testing.assert_array_equal(np.float32(read[5] or []), np.float32(sent[5] or []))


def test_only_this_pair_and_only_since_then_counts(log, database_url):
    items = drawn()
    for item in [*items, mirrored(3, champion=3), mirrored(3, challenger=4), mirrored(3, champion=2, challenger=1)]:
        log.append(item)
    assert log.flush()
    assert_holds(read_shadow(database_url, 1, 2, START + timedelta(seconds=25)), items[25:])
    assert read_shadow(database_url, 1, 2, START + timedelta(days=1)).n == 0


def test_a_limit_takes_the_oldest_images(log, database_url):
    items = drawn(8)
    for item in items:
        log.append(item)
    assert log.flush()
    whole = sum(len(item.champion_classes) for item in items[:6])
    assert_holds(read_shadow(database_url, 1, 2, START, limit=whole), items[:6])
    within = read_shadow(database_url, 1, 2, START, limit=whole + 1)  # the next request has three images
    assert (within.n, len(within.champion_ms)) == (whole + 1, len([i for i in items[:7] if i.failure is None]))
    assert_holds(read_shadow(database_url, 1, 2, START, limit=10_000), items)


def test_nothing_mirrored_is_none_and_not_an_error(database_url):
    shadow = read_shadow(database_url, 1, 2, START)
    assert (shadow.n, shadow.disagreements, shadow.failures) == (0, 0, 0)
    assert shadow.champion_ms.shape == shadow.challenger_ms.shape == (0,)


def test_where_all_failed_there_are_no_times(log, database_url):
    log.append(mirrored(3, failure="it broke"))
    assert log.flush()
    shadow = read_shadow(database_url, 1, 2, START)
    assert (shadow.n, shadow.disagreements, shadow.failures, len(shadow.challenger_ms)) == (3, 0, 3, 0)


def test_the_same_request_twice_is_kept_once_for_each_challenger(log, database_url):
    same = mirrored(2)
    for _ in range(3):
        log.append(same)
    log.append(Mirrored(**{**vars(same), "challenger_version": 3}))
    assert log.flush()
    assert rows(database_url) == [(4,)]
    assert read_shadow(database_url, 1, 2, START).n == 2


def test_a_row_is_an_answer_or_a_failure(database_url):
    def write_half() -> None:
        with transaction(database_url) as connection:
            connection.cursor().execute(
                "INSERT INTO shadow_predictions (request_id, item_index, created_at, champion_version,"
                " challenger_version, champion_class, challenger_class, champion_ms)"
                f" VALUES ('{uuid4()}', 0, now(), 1, 2, 3, 3, 1)"
            )

    with pytest.raises(psycopg2.errors.CheckViolation):
        write_half()


def test_while_postgresql_is_away_rows_wait_and_what_does_not_fit_is_counted(tmp_path_factory, tmp_path):
    from ml.stack.migrations import migrate

    postgres = PostgresProcess(tmp_path_factory.mktemp("outage") / "data")
    database_url = postgres.new_database("predictions")
    migrate(database_url)
    log = ShadowLog(database_url, tmp_path, spool_bytes=2500, longest_pause=0.2)
    log.start()
    postgres.stop()
    try:
        kept = [mirrored(10, seed=seed, after=seed) for seed in range(5)]
        assert all(log.append(item) for item in kept)
        assert not log.append(mirrored(3))
        assert not log.flush(0.3)
        state = log.state()
        assert (state.queued, state.dropped, state.database_ok) == (50, 3, False)
    finally:
        postgres.start()
    assert log.flush(20)
    assert_holds(read_shadow(database_url, 1, 2, START), kept)
    assert log.state().database_ok
    log.close()
    postgres.stop()


def test_what_waits_at_the_end_is_written_by_the_next(database_url, tmp_path):
    log = ShadowLog(NOBODY, tmp_path, longest_pause=0.1)
    log.start()
    items = drawn(7)
    for item in items:
        log.append(item)
    log.close(timeout=0.5)
    assert (log.state().written, log.state().dropped) == (0, 0)
    assert not any(t.name == "shadow-log" and t.is_alive() for t in threading.enumerate())
    following = ShadowLog(database_url, tmp_path)
    following.start()
    assert following.flush()
    following.close()
    assert_holds(read_shadow(database_url, 1, 2, START), items)


def test_reading_without_a_database_is_could_not_ask():
    with pytest.raises(DatabaseUnavailable):
        read_shadow(NOBODY, 1, 2, START)
