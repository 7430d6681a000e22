"""The spool: whatever happens to its bytes, what is whole is read, in order, and nothing crashes or waits for ever."""

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ml.monitoring import spool
from ml.monitoring.spool import Place, adopt, create, framed

PAYLOADS = [bytes([k]) * (20 + 7 * k) + spool._MARK for k in range(8)]  # a mark inside a payload is no record


def put(one, payloads, rows=1):
    for payload in payloads:
        one.append(framed(payload, rows))


def drained(one, rows=3):
    """Everything that waits, read and passed in small steps; the payloads and the damages."""
    payloads, damages = [], []
    for _ in range(1000):
        reading = one.read(rows)
        if not reading.records and not reading.damages:
            return payloads, damages
        payloads += [record.payload for record in reading.records]
        damages += reading.damages
        one.pass_to(reading.end)
    pytest.fail("it never ends")


def left_by_a_dead_process(parent, payloads, segment_bytes=1 << 20):
    """A folder as `kill -9` leaves it: its lock is free, nothing is tidied."""
    one = create(parent, segment_bytes=segment_bytes)
    put(one, payloads)
    os.close(one._lock)
    return one.folder


def test_what_is_appended_is_read_in_order_across_files_and_files_that_are_done_go(tmp_path):
    one = create(tmp_path, segment_bytes=100)
    put(one, PAYLOADS)
    assert len(list(one.folder.glob("*.log"))) > 3
    assert one.waiting_bytes == sum(len(framed(payload, 1)) for payload in PAYLOADS)
    first = one.read(3)
    assert [record.payload for record in first.records] == PAYLOADS[:3]
    assert one.read(3) == first  # nothing is forgotten before it is passed
    one.pass_to(first.end)
    assert drained(one) == (PAYLOADS[3:], [])
    assert one.waiting_bytes == 0
    assert len(list(one.folder.glob("*.log"))) == 1
    put(one, PAYLOADS[:2])
    assert drained(one) == (PAYLOADS[:2], [])
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_so_many_rows_are_read_but_always_one_record(tmp_path):
    one = create(tmp_path)
    put(one, PAYLOADS, rows=4)
    assert [len(one.read(rows).records) for rows in (1, 4, 7, 8, 100)] == [1, 1, 1, 2, 8]
    before = Place(1, len(framed(PAYLOADS[0], 4)))
    assert [record.payload for record in one.read(100, before=before).records] == PAYLOADS[:1]
    one.close()


def test_a_record_larger_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_CHUNK", 64)
    one = create(tmp_path)
    large = [*PAYLOADS, bytes(1000), *PAYLOADS]
    put(one, large)
    assert drained(one) == (large, [])
    one.close()


def test_what_a_dead_process_left_is_adopted_once_from_where_it_stood(tmp_path):
    one = create(tmp_path, segment_bytes=100)
    put(one, PAYLOADS)
    one.pass_to(one.read(3).end)
    assert adopt(tmp_path) == []  # its owner lives
    os.close(one._lock)
    [adopted] = adopt(tmp_path)
    assert adopt(tmp_path) == []  # and now it has another
    assert drained(adopted) == (PAYLOADS[3:], [])
    adopted.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_read_means_from_the_start(tmp_path):
    folder = left_by_a_dead_process(tmp_path, PAYLOADS)
    for written in ("", "1", "x y", "1 -5"):
        (folder / "reached").write_text(written)
        [adopted] = adopt(tmp_path)
        assert [record.payload for record in adopted.read(100).records] == PAYLOADS
        os.close(adopted._lock)


@pytest.fixture(scope="module")
def template():
    with tempfile.TemporaryDirectory() as parent:
        yield left_by_a_dead_process(Path(parent), PAYLOADS)


ENDS = [sum(len(framed(payload, 1)) for payload in PAYLOADS[: k + 1]) for k in range(len(PAYLOADS))]


@given(cut=st.integers(0, ENDS[-1]))
def test_a_cut_anywhere_loses_no_whole_record(template, cut):
    """The last write of a killed process, or a file that a crashed machine left too short."""
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(template, Path(parent) / "it")
        [file] = folder.glob("*.log")
        os.truncate(file, cut)
        found = adopt(Path(parent))
        payloads, damages = drained(found[0]) if found else ([], [])
        assert payloads == PAYLOADS[: sum(end <= cut for end in ENDS)]
        assert all(damage.torn for damage in damages)
        assert bool(damages) == (cut not in (0, *ENDS))


@given(at=st.integers(0, ENDS[-1] - 1), bit=st.integers(0, 7))
@example(at=8, bit=7)  # the first record's length
@example(at=ENDS[6] + 15, bit=7)  # the last record's
def test_a_flipped_bit_anywhere_costs_its_own_record_alone(template, at, bit):
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(template, Path(parent) / "it")
        [file] = folder.glob("*.log")
        content = bytearray(file.read_bytes())
        content[at] ^= 1 << bit
        file.write_bytes(content)
        [adopted] = adopt(Path(parent))
        payloads, damages = drained(adopted)
        hit = next(k for k, end in enumerate(ENDS) if at < end)
        assert payloads == [payload for k, payload in enumerate(PAYLOADS) if k != hit]
        assert len(damages) == 1


@given(garbage=st.binary(max_size=200), where=st.integers(0, 8))
def test_garbage_between_records_is_stepped_over(garbage, where):
    with tempfile.TemporaryDirectory() as parent:
        one = create(Path(parent))
        put(one, PAYLOADS[:where])
        os.write(one._descriptors.get(1) or os.open(one._path(1), os.O_CREAT | os.O_WRONLY | os.O_APPEND), garbage)
        os.close(one._lock)
        content = one._path(1).read_bytes() + b"".join(framed(payload, 1) for payload in PAYLOADS[where:])
        one._path(1).write_bytes(content)
        [adopted] = adopt(Path(parent))
        assert drained(adopted)[0] == PAYLOADS


def test_a_disk_that_takes_half_a_record_has_taken_none(tmp_path, monkeypatch):
    one = create(tmp_path)
    put(one, PAYLOADS[:2])
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:10]))
    with pytest.raises(OSError, match="10 of"):
        put(one, PAYLOADS[2:3])
    monkeypatch.undo()
    put(one, PAYLOADS[3:])
    assert drained(one) == ([*PAYLOADS[:2], *PAYLOADS[3:]], [])
    one.close()


def test_half_a_record_that_cannot_be_taken_back_is_left_behind(tmp_path, monkeypatch):
    one = create(tmp_path)
    real = os.write

    def refuse(*_):
        raise OSError(errno.EIO, "no")

    put(one, PAYLOADS[:2])
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:10]))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="no"):
        put(one, PAYLOADS[2:3])
    monkeypatch.undo()
    put(one, PAYLOADS[3:])
    os.close(one._lock)
    [adopted] = adopt(tmp_path)
    payloads, damages = drained(adopted)
    assert payloads == [*PAYLOADS[:2], *PAYLOADS[3:]]
    assert [damage.torn for damage in damages] == [True]
    assert drained(one)[0] == [*PAYLOADS[:2], *PAYLOADS[3:]]


def test_a_file_that_cannot_be_read_is_given_up(tmp_path, monkeypatch):
    one = create(tmp_path, segment_bytes=100)
    put(one, PAYLOADS)
    lost = one.read(100)
    in_first = len(one._path(1).read_bytes())
    aside = one.skip_segment()
    assert aside.read_bytes() == b"".join(record.framed for record in lost.records)[:in_first]
    rest = drained(one)[0]
    assert rest == PAYLOADS[len(PAYLOADS) - len(rest) :]
    assert 0 < len(rest) < len(PAYLOADS)
    one.close()
    assert [path.name for path in one.folder.iterdir()] == [aside.name]  # for people; nobody adopts it
    assert adopt(tmp_path) == []


def test_a_deleted_folder_loses_nothing_while_the_process_lives(tmp_path):
    one = create(tmp_path)
    put(one, PAYLOADS[:3])
    shutil.rmtree(one.folder)
    put(one, PAYLOADS[3:])
    assert [record.payload for record in one.read(100).records] == PAYLOADS


def test_a_note_outlives_the_process(tmp_path):
    one = create(tmp_path)
    one.keep_note("so many are missing")
    os.close(one._lock)
    [adopted] = adopt(tmp_path)
    assert adopted.note() == "so many are missing"
    adopted.keep_note("")
    adopted.close()
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_there_before_it_is_locked(tmp_path, monkeypatch):
    seen = []

    def look(descriptor, how):
        seen.append([path.name[0] for path in tmp_path.iterdir()])
        assert adopt(tmp_path) == []

    monkeypatch.setattr(fcntl, "flock", look)
    create(tmp_path)
    assert seen == [["."]]
