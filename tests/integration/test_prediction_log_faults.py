"""What the prediction log survives, on a real PostgreSQL: kills, full and broken disks, a bound, clocks, neighbours."""

import errno
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime, timedelta
from uuid import UUID, uuid4

import numpy as np
import pytest

from ml.database import transaction
from ml.errors import DatabaseUnavailable, PredictionNotFound
from ml.monitoring import batch_writer, spool
from ml.monitoring.prediction_log import LoggedPrediction, PredictionLog, record_feedback
from ml.monitoring.retention import remove_old
from ml.monitoring.shadow_log import ShadowLog
from ml.settings import PROJECT_ROOT
from tests.integration.test_shadow_log import mirrored

NOBODY = "postgresql://x@127.0.0.1:9/x"


def prediction(n=1, *, request_id=None, at=None, version=1):
    return LoggedPrediction(
        request_id=request_id or uuid4(),
        created_at=at or datetime.now(UTC),
        model_name="cifar10-classifier",
        model_version=version,
        probabilities=np.full((n, 10), 0.1, np.float32),
        images=np.zeros((n, 32, 32, 3), np.uint8),
    )


def rows(url, query):
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def ids(url):
    """The requests in the order of their rows' ids, one entry a row."""
    return [UUID(row[0]) for row in rows(url, "SELECT request_id FROM predictions ORDER BY id")]


def opened(url, folder, **more):
    log = PredictionLog(url, folder, longest_pause=0.2, **more)
    log.start()
    return log


def wait_for(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


APPENDING = """
import sys
from pathlib import Path
from tests.integration.test_prediction_log_faults import opened, prediction
log = opened(sys.argv[1], Path(sys.argv[2]))
while True:
    sent = prediction()
    if log.append(sent):
        print(sent.request_id, flush=True)
"""


@pytest.mark.parametrize("database", ["up", "away"])
def test_every_append_that_was_acknowledged_outlives_a_kill_exactly_once(database, database_url, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", APPENDING, database_url if database == "up" else NOBODY, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
    )
    said = [process.stdout.readline() for _ in range(700)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().splitlines(keepends=True)
    process.wait(10)
    acknowledged = [UUID(line.strip()) for line in said if line.endswith("\n")]
    log = opened(database_url, tmp_path)
    assert log.flush(30)
    log.close()
    stored = ids(database_url)
    # One that was taken and not yet answered may be there too.
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) - len(acknowledged) <= 1
    assert list(tmp_path.iterdir()) == []


def test_what_was_committed_and_not_remembered_is_not_written_again(database_url, tmp_path, monkeypatch):
    """As a kill between the commit and the note of it."""
    log = opened(database_url, tmp_path)
    sent = [prediction(2) for _ in range(30)]
    for item in sent:
        log.append(item)
    monkeypatch.setattr(spool, "write_whole", lambda *_, **__: None)  # the place is not kept
    assert log.flush()
    folder = log._spool.folder
    os.close(log._spool._lock)
    monkeypatch.undo()
    following = opened(database_url, tmp_path)
    last = prediction()
    following.append(last)
    assert following.flush()
    assert ids(database_url) == [item.request_id for item in sent for _ in range(2)] + [last.request_id]
    assert not folder.exists()
    following.close()


def test_processes_that_share_a_folder_write_each_its_own_and_once(database_url, tmp_path):
    logs = [opened(database_url, tmp_path) for _ in range(3)]
    sent = [(log, prediction()) for _ in range(50) for log in logs]
    threads = [
        threading.Thread(target=lambda log=log: [log.append(item) for one, item in sent if one is log]) for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(log.flush() for log in logs)
    assert [log.state().written for log in logs] == [50, 50, 50]
    assert sorted(ids(database_url)) == sorted(item.request_id for _, item in sent)
    for log in logs:
        log.close()


def test_an_orphan_is_found_while_a_log_is_open(database_url, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_writer, "_LOOK_FOR_ORPHANS_EVERY", 0.1)
    log = opened(database_url, tmp_path)
    other = opened(NOBODY, tmp_path)
    sent = prediction(3)
    other.append(sent)
    other.close(timeout=0.1)
    wait_for(lambda: len(ids(database_url)) == 3)
    log.close()


def test_a_folder_that_cannot_be_taken_over_holds_up_nobody(database_url, tmp_path, caplog):
    (tmp_path / "odd" / "lock").mkdir(parents=True)
    (tmp_path / "a file").write_text("")
    (tmp_path / "without a lock").mkdir()
    log = opened(database_url, tmp_path)
    sent = prediction()
    log.append(sent)
    assert log.flush()
    assert ids(database_url) == [sent.request_id]
    assert sum("cannot be taken over" in record.message for record in caplog.records) == 1
    log.close()


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes nothing while `full` is set; everything else of the process can write."""
    full, real = threading.Event(), os.write

    def write(descriptor, data):
        if full.is_set() and data.startswith(spool._MARK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(batch_writer, "_DISK_PAUSE", 0.05)
    return full


def test_a_full_disk_loses_nothing_and_keeps_the_order(database_url, tmp_path, full_disk, caplog):
    log = opened(NOBODY, tmp_path, capacity=20)
    sent = [prediction() for _ in range(30)]
    for item in sent[:10]:
        assert log.append(item)
    full_disk.set()
    for item in sent[10:20]:
        assert log.append(item)
    state = log.state()
    assert (state.unspooled, state.spool_ok, state.queued, state.dropped) == (10, False, 20, 0)
    full_disk.clear()
    time.sleep(0.06)
    for item in sent[20:]:
        assert log.append(item)
    assert log.state().spool_ok
    log._database_url = database_url  # PostgreSQL is back
    assert log.flush()
    assert ids(database_url) == [item.request_id for item in sent]
    log.close()
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert sum("takes nothing" in line for line in told) == 1


def test_a_real_limit_of_the_disk_is_met_in_the_middle_of_a_record(database_url, tmp_path):
    """RLIMIT_FSIZE cuts a write off, as a disk that becomes full does."""
    script = """
import resource, signal, sys
from pathlib import Path
from tests.integration.test_prediction_log_faults import opened, prediction
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
log = opened(sys.argv[1], Path(sys.argv[2]))
sent = [prediction() for _ in range(8)]
assert all(log.append(item) for item in sent)
state = log.state()
assert (state.unspooled, state.spool_ok) == (5, False), state
assert log.flush(), log.state()
log.close()
print(*(item.request_id for item in sent))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, database_url, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ids(database_url) == [UUID(word) for word in ended.stdout.split()]


def test_a_disk_that_stalls_holds_up_one_request_alone(database_url, tmp_path, monkeypatch):
    log = opened(database_url, tmp_path)
    stalled, goes_on, real = threading.Event(), threading.Event(), os.write

    def write(descriptor, data):
        if data.startswith(spool._MARK) and not stalled.is_set():
            stalled.set()
            assert goes_on.wait(20)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    sent = [prediction() for _ in range(20)]
    first = threading.Thread(target=log.append, args=(sent[0],))
    first.start()
    assert stalled.wait(5)
    began = time.monotonic()
    assert all(log.append(item) for item in sent[1:])
    assert time.monotonic() - began < 0.5
    assert log.state().unspooled == 19
    wait_for(lambda: len(ids(database_url)) == 19)  # nor does the database wait for that disk
    goes_on.set()
    first.join()
    later = prediction()  # at once on the disk again, where a kill cannot reach it
    assert log.append(later)
    assert log.state().unspooled == 19
    assert log.flush()
    assert sorted(ids(database_url)) == sorted(item.request_id for item in (*sent, later))
    log.close()


def test_a_request_that_waits_briefly_for_another_keeps_to_the_disk(database_url, tmp_path):
    """On two busy cores a thread that has the lock may get no turn for a while."""
    log = opened(database_url, tmp_path)
    taken = threading.Event()

    def hold():
        with log._disk:
            taken.set()
            time.sleep(0.03)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(5)
    assert log.append(prediction())
    assert (log.state().unspooled, log.state().spool_ok) == (0, True)
    holder.join()
    log.close()


def test_a_folder_that_cannot_be_made_is_told_and_tried_again(database_url, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(batch_writer, "_DISK_PAUSE", 0.05)
    (tmp_path / "spool").write_text("a file in its place")
    log = opened(database_url, tmp_path / "spool")
    assert log.append(prediction())
    assert not log.state().spool_ok
    assert sum("takes nothing" in record.message for record in caplog.records) == 1
    (tmp_path / "spool").unlink()
    time.sleep(0.06)
    assert log.append(prediction())
    assert log.state().spool_ok
    assert log.flush()
    assert len(ids(database_url)) == 2
    log.close()


@pytest.mark.parametrize("process", ["goes on", "is killed"])
def test_the_bound_is_counted_told_once_and_written_down(process, database_url, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(batch_writer, "_EPISODE_ENDS_AFTER", 0.2)
    log = opened(NOBODY, tmp_path, spool_bytes=20_000)
    taken = [log.append(prediction()) for _ in range(20)]
    assert taken == [True] * 6 + [False] * 14
    assert (log.state().dropped, log.state().spool_ok) == (14, True)
    assert sum("are dropped" in record.message for record in caplog.records) == 1
    if process == "is killed":
        wait_for(lambda: '"rows": 14' in log._spool.note())
        os.close(log._spool._lock)
        log = opened(database_url, tmp_path, spool_bytes=20_000)
    else:
        log._database_url = database_url
    wait_for(lambda: rows(database_url, "SELECT rows, reason, log FROM prediction_gaps"))
    assert rows(database_url, "SELECT rows, reason, log, told_at FROM prediction_gaps") == [
        (14, "the spool is full", "Prediction log", None)
    ]
    assert log.flush()
    assert len(ids(database_url)) == 6
    assert log.append(prediction())
    assert log.flush()
    log.close()
    assert list(rows(database_url, "SELECT count(*) FROM prediction_gaps")) == [(1,)]


def test_the_memory_is_bounded_too(tmp_path, full_disk, caplog):
    full_disk.set()
    log = opened(NOBODY, tmp_path, capacity=5)
    assert [log.append(prediction()) for _ in range(7)] == [True] * 5 + [False] * 2
    log.close(timeout=0.1)
    assert log.state().dropped == 7
    assert any("5 rows in memory" in record.message for record in caplog.records)


def test_memory_goes_to_the_disk_at_the_end_where_that_works_again(database_url, tmp_path, full_disk):
    full_disk.set()
    log = opened(NOBODY, tmp_path)
    sent = [prediction() for _ in range(5)]
    assert all(log.append(item) for item in sent)
    full_disk.clear()
    log.close(timeout=0.1)
    assert log.state().dropped == 0
    following = opened(database_url, tmp_path)
    assert following.flush()
    following.close()
    assert ids(database_url) == [item.request_id for item in sent]


def test_a_record_that_postgresql_refuses_is_kept_aside_and_costs_no_neighbour(database_url, tmp_path):
    with transaction(database_url) as connection:
        connection.cursor().execute("ALTER TABLE predictions ADD CHECK (model_version <> 13)")
    log = opened(database_url, tmp_path, flush_every=0.5)
    sent = [prediction(version=13 if k == 7 else 1) for k in range(40)]
    for item in sent:
        log.append(item)
    assert log.flush()
    assert ids(database_url) == [item.request_id for k, item in enumerate(sent) if k != 7]
    state = log.state()
    assert (state.written, state.refused, state.dropped, state.queued) == (39, 1, 0, 0)
    [aside] = tmp_path.glob("*/*.refused")
    assert spool.record_at(aside.read_bytes(), 0).payload == log._encode(sent[7])
    log.close()
    assert aside.exists()


def test_a_record_that_cannot_be_read_back_is_kept_aside(database_url, tmp_path, monkeypatch):
    log = opened(database_url, tmp_path)
    monkeypatch.setattr(log, "_encode", lambda _: b"of another version")
    log.append(prediction())
    monkeypatch.undo()
    sent = prediction()
    log.append(sent)
    assert log.flush()
    assert log.state().refused == 1
    assert ids(database_url) == [sent.request_id]
    log.close()


def test_damage_in_the_middle_costs_its_own_record_and_a_torn_end_none(database_url, tmp_path, caplog):
    dead = opened(NOBODY, tmp_path)
    sent = [prediction() for _ in range(5)]
    for item in sent:
        dead.append(item)
    dead.close(timeout=0.1)
    [file] = tmp_path.glob("*/*.log")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content + content[:1000])
    log = opened(database_url, tmp_path)
    assert log.flush()
    assert ids(database_url) == [item.request_id for k, item in enumerate(sent) if k != 2]
    assert log.state().damaged == 1
    assert any("cut off at 1000 bytes" in record.message for record in caplog.records)
    log.close()
    assert len(list(tmp_path.glob("*/*.corrupt"))) == 1


def test_a_file_that_cannot_be_read_holds_up_nobody(database_url, tmp_path, monkeypatch):
    dead = opened(NOBODY, tmp_path)
    for _ in range(5):
        dead.append(prediction())
    dead.close(timeout=0.1)
    [bad] = tmp_path.glob("*/*.log")
    inode, real = bad.stat().st_ino, os.pread

    def pread(descriptor, size, offset):
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    log = opened(database_url, tmp_path)
    sent = prediction()
    log.append(sent)
    assert log.flush(10)
    assert ids(database_url) == [sent.request_id]
    assert log.state().damaged == 1
    assert bad.with_suffix(".corrupt").exists()
    log.close()


def test_a_clock_that_jumps_does_no_harm(database_url, tmp_path, monkeypatch):
    log = opened(database_url, tmp_path)
    times = [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime.now(UTC),
        datetime(2106, 2, 7, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime.now(UTC),
    ]
    # Nothing waits by the clock on the wall: it stands still and goes back here.
    monkeypatch.setattr(time, "time", lambda: -1e9)
    for at in times:
        log.append(prediction(at=at))
        assert log.flush()
    monkeypatch.undo()
    assert [row[0] for row in rows(database_url, "SELECT created_at FROM requests WHERE created_at < '9000-01-01' "
                                   "ORDER BY created_at")] == sorted(times)[:-1]  # fmt: skip
    assert rows(database_url, "SELECT count(*) FROM predictions") == [(6,)]
    log.close()


# --- how long they are kept -------------------------------------------------------------------------------------------

NOW = datetime(2026, 3, 31, 12, tzinfo=UTC)


def test_days_that_are_too_old_go_with_all_that_hangs_on_them(database_url, tmp_path):
    log, shadows = opened(database_url, tmp_path / "p"), ShadowLog(database_url, tmp_path / "s")
    shadows.start()
    sent = {back: prediction(2, at=NOW - timedelta(days=back)) for back in (0, 29, 30, 31, 32, 400)}
    for item in sent.values():
        log.append(item)
    for back in (0, 40):
        shadows.append(mirrored(3, after=(NOW - timedelta(days=back) - datetime(2026, 11, 23, 12, tzinfo=UTC))
                                / timedelta(seconds=1)))  # fmt: skip
    assert log.flush()
    assert shadows.flush()
    for back in (30, 31):
        record_feedback(database_url, sent[back].request_id, 1, 5)
    removed = remove_old(database_url, 30, now=NOW)
    assert (removed.before, removed.days) == (
        date(2026, 3, 1),
        [(NOW - timedelta(days=back)).date() for back in (400, 32, 31)],
    )
    assert (removed.requests, removed.shadow_predictions) == (3, 3)
    kept = [str(sent[back].request_id) for back in (0, 29, 30)]
    assert {row[0] for row in rows(database_url, "SELECT request_id FROM predictions")} == set(kept)
    assert {row[0] for row in rows(database_url, "SELECT request_id FROM requests")} == set(kept)
    assert rows(database_url, "SELECT request_id FROM feedback") == [(kept[2],)]
    with pytest.raises(PredictionNotFound):
        record_feedback(database_url, sent[31].request_id, 1, 5)
    again = remove_old(database_url, 30, now=NOW)
    assert (again.days, again.requests) == ([], 0)
    # A late row of a day that was dropped, and the log that knew that day: it is made again.
    log.append(prediction(at=NOW - timedelta(days=31)))
    assert log.flush()
    assert rows(database_url, "SELECT count(*) FROM predictions") == [(7,)]
    log.close()
    shadows.close()


def test_a_clock_ahead_removes_nothing(database_url, tmp_path):
    log = opened(database_url, tmp_path)
    log.append(prediction())
    assert log.flush()
    log.close()
    assert remove_old(database_url, 1, now=datetime.now(UTC) + timedelta(days=4000)).days == []
    assert len(ids(database_url)) == 1


def test_a_reader_that_holds_a_day_for_long_is_waited_for_another_time(database_url, tmp_path, monkeypatch):
    monkeypatch.setattr("ml.monitoring.retention._LOCK_WAIT", "100ms")
    log = opened(database_url, tmp_path)
    log.append(prediction(at=NOW - timedelta(days=300)))
    assert log.flush()
    log.close()
    with transaction(database_url) as reader:
        reader.cursor().execute("SELECT count(*) FROM predictions")
        with pytest.raises(DatabaseUnavailable, match="retain"):
            remove_old(database_url, 30, now=NOW)
    assert len(remove_old(database_url, 30, now=NOW).days) == 1


def test_the_servers_role_makes_and_drops_days_and_no_other_table(postgres, tmp_path):
    """The rights of deploy/postgres/databases: one role owns the tables, the server's writes rows."""
    from ml.stack.migrations import migrate

    name = f"owned_{secrets.token_hex(4)}"
    owner = postgres.new_database(name)
    writer = postgres.new_database(f"{name}_writer").rsplit("/", 1)[0] + f"/{name}"
    with transaction(owner) as connection:
        connection.cursor().execute(
            f"GRANT CONNECT ON DATABASE {name} TO {name}_writer;"
            "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES "
            f"TO {name}_writer;"
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO {name}_writer;"
        )
    migrate(owner)
    log = opened(writer, tmp_path)
    log.append(prediction(at=NOW - timedelta(days=300)))
    log.append(prediction())
    assert log.flush()
    log.close()
    from ml.monitoring.windows import settled_id

    assert settled_id(writer) == 2
    assert len(remove_old(writer, 30, now=NOW).days) == 1
    with pytest.raises(Exception, match="permission denied"), transaction(writer) as connection:
        connection.cursor().execute("CREATE TABLE mine ()")
