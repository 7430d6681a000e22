"""A queue that is a folder: records are appended to files, read in order, and forgotten once they are safe elsewhere.

Owns the format of the files and the folders' locks; what a record means, and when it is safe, is its user's.

- A record is appended with one write, and not synced: it survives the death of the process (`kill -9`), not that of
  the machine.
- A folder belongs to the process that holds its lock. Whoever finds one without an owner takes it over.
- A record is `mark (its last byte is the format's version), CRC-32, rows, length, payload`, little-endian. Every record
  can be found by itself: whatever happens to the bytes before it, reading goes on at the next mark whose CRC holds.
"""

import errno
import fcntl
import logging
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from ml.files import write_whole

logger = logging.getLogger(__name__)

_MARK = b"\xc1\x0ar\x01"
_COUNTS = struct.Struct("<II")
_HEADER = struct.Struct("<4sIII")
HEADER_BYTES = _HEADER.size
_CHUNK = 2 << 20
_LOCK, _REACHED, _NOTE = "lock", "reached", "note"


class Place(NamedTuple):
    """Where a record begins: the number of its segment, and the byte in it. Later records have greater places."""

    segment: int
    offset: int


@dataclass(frozen=True)
class Record:
    """A payload, how many rows its user counts in it, and its bytes as they stand in the file."""

    payload: bytes
    rows: int
    framed: bytes


@dataclass(frozen=True)
class Damage:
    """Bytes between records that are none. `torn`: the end of a file whose last write was cut off."""

    content: bytes
    torn: bool


@dataclass(frozen=True)
class Reading:
    """Records in order, what was stepped over between them, and the place after all of it."""

    records: list[Record]
    damages: list[Damage]
    end: Place


def framed(payload: bytes, rows: int) -> bytes:
    """The payload as it stands in a file."""
    counts = _COUNTS.pack(rows, len(payload))
    return b"".join((_MARK, crc32(payload, crc32(counts)).to_bytes(4, "little"), counts, payload))


def record_at(data: bytes, at: int) -> Record | None:
    """The record that begins at byte `at`; None where none does, or not the whole of it is there."""
    if not data.startswith(_MARK, at) or len(data) - at < _HEADER.size:
        return None
    _, checksum, rows, length = _HEADER.unpack_from(data, at)
    begin = at + _HEADER.size
    payload = data[begin : begin + length]
    if len(payload) < length or crc32(payload, crc32(_COUNTS.pack(rows, length))) != checksum:
        return None
    return Record(payload, rows, data[at : begin + length])


def _next_record(data: bytes, at: int) -> int:
    """The first byte from `at` on where a whole record begins; the data's length where there is none."""
    while (at := data.find(_MARK, at)) >= 0:
        if record_at(data, at) is not None:
            return at
        at += 1
    return len(data)


def _is_torn(tail: bytes) -> bool:
    """Whether a file's end looks like a write that was cut off, rather than like something else."""
    if len(tail) < _HEADER.size:
        return _MARK.startswith(tail[: len(_MARK)])
    return tail.startswith(_MARK) and len(tail) - _HEADER.size < _HEADER.unpack_from(tail)[3]


class Spool:
    """One folder of records. One thread at a time may write, and another one read meanwhile.

    Made by `create` or `adopt`, which take the folder's lock.

    Args:
        folder: where the files lie.
        lock: descriptor of the folder's lock, held.
        segment_bytes: how long a file gets before the next one is begun.
    """

    def __init__(self, folder: Path, lock: int, *, segment_bytes: int = 16 << 20) -> None:
        self.folder = folder
        self._lock = lock
        self._segment_bytes = segment_bytes
        self._descriptors: dict[int, int] = {}
        # Where each segment begins in the sequence of all bytes: differences of these say how much waits.
        self._begins: dict[int, int] = {}
        self._end = Place(0, 0)
        for number in sorted(int(path.stem) for path in folder.glob("*.log") if path.stem.isdigit()):
            self._begins[number] = self._bytes_before(self._end)
            self._end = Place(number, self._path(number).stat().st_size)
        self._reached = self._recalled()
        self._appending = False

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were written and not passed yet. The files may hold one segment more."""
        return self._bytes_before(self._end) - self._bytes_before(self._reached)

    @property
    def end(self) -> Place:
        """The place after the last record."""
        return self._end

    # --- writing

    def append(self, record: bytes) -> None:
        """Adds what `framed` made: all of it or, where the disk refuses, none.

        Raises:
            OSError: the disk refused. The next call tries again.
        """
        if not self._appending or self._end.offset >= self._segment_bytes:
            self._begin_segment()
        segment, offset = self._end
        descriptor = self._descriptors[segment]
        try:
            written = os.write(descriptor, record)
            if written < len(record):
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes were written")
        except OSError:
            # Where even this fails, what was half written stays, and the next record begins another file.
            self._appending = False
            os.ftruncate(descriptor, offset)
            self._appending = True
            raise
        self._end = Place(segment, offset + written)

    def _begin_segment(self) -> None:
        number = self._end.segment + 1
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptors[number] = os.open(self._path(number), flags, 0o640)
        self._begins[number] = self._bytes_before(self._end)
        self._end = Place(number, 0)
        self._appending = True

    # --- reading

    def read(self, rows: int, before: Place | None = None) -> Reading:
        """What comes next: records of `rows` rows in all at most, but at least one where there is one.

        The same is read again until `pass_to` says that it is safe.

        Args:
            rows: how many rows.
            before: nothing that begins at this place or later.

        Raises:
            OSError: the disk cannot be read. `skip_segment` gives up on what is in the way.
        """
        end = self._end if before is None else min(before, self._end)
        place, room = self._reached, rows
        records: list[Record] = []
        damages: list[Damage] = []
        while room > 0 and (place := self._present(place)) < end:
            limit = end.offset if place.segment == end.segment else self._size(place.segment)
            at = place.offset
            for found in self._records(place, limit):
                if isinstance(found, Record):
                    if records and found.rows > room:
                        room = 0
                    if room <= 0:
                        break
                    records.append(found)
                    room -= found.rows
                    at += len(found.framed)
                else:
                    damages.append(found)
                    at += len(found.content)
            else:
                at = limit
            place = Place(place.segment, at)
        return Reading(records, damages, place)

    def _records(self, place: Place, limit: int) -> Iterator[Record | Damage]:
        """What a segment holds from `place` to its byte `limit`."""
        offset = place.offset
        descriptor = self._descriptor(place.segment)
        chunk = _CHUNK
        while offset < limit:
            data = os.pread(descriptor, min(limit - offset, chunk), offset)
            if not data:
                return  # the file was longer once; what is gone cannot be waited for
            is_rest = offset + len(data) == limit or len(data) < chunk
            at = 0
            while at < len(data):
                record = record_at(data, at)
                if record is not None:
                    yield record
                    at += len(record.framed)
                elif not is_rest:
                    break  # it may go on in what was not read yet
                else:
                    whole = _next_record(data, at + 1)
                    lost = data[at:whole]
                    yield Damage(lost, torn=whole == len(data) and _is_torn(lost))
                    at = whole
            # Where not even one record fits, or the first is none: the whole rest, to look for the next one in.
            chunk = _CHUNK if at else limit - offset
            offset += at

    def pass_to(self, place: Place) -> None:
        """Everything before `place` is safe: remembers it, and deletes the segments that are behind it.

        Raises:
            OSError: it could not be remembered. A later owner of the folder then reads some records again.
        """
        self._reached = place = self._present(place)
        for number in [number for number in list(self._begins) if number < place.segment]:
            descriptor = self._descriptors.pop(number, None)
            if descriptor is not None:
                os.close(descriptor)
            self._path(number).unlink(missing_ok=True)
            del self._begins[number]
        write_whole(self.folder / _REACHED, f"{place.segment} {place.offset}", mode=0o640)

    def skip_segment(self) -> Path | None:
        """Gives up on the file that is to be read next: it stays as `*.corrupt`. Not to be called during an `append`.

        Raises:
            OSError: it could not be renamed or the next place not be remembered; it is skipped all the same.
        """
        place = self._present(self._reached)
        if place >= self._end:
            return None
        if place.segment == self._end.segment:
            self._begin_segment()
        path = self._path(place.segment)
        try:
            path.rename(path.with_suffix(".corrupt"))
        finally:
            self.pass_to(Place(place.segment, self._size(place.segment)))
        return path.with_suffix(".corrupt")

    # --- the folder

    def note(self) -> str:
        """What was kept beside the records; empty where nothing was."""
        path = self.folder / _NOTE
        return path.read_text() if path.exists() else ""

    def keep_note(self, content: str) -> None:
        """Keeps a text beside the records, in place of the one before; an empty one removes it.

        Raises:
            OSError: the disk refused.
        """
        if content:
            write_whole(self.folder / _NOTE, content, mode=0o640)
        else:
            (self.folder / _NOTE).unlink(missing_ok=True)

    def set_aside(self, content: bytes, kind: str) -> Path:
        """Keeps bytes that nobody could use in a file of the folder that ends on `.kind`, for people to look at.

        Raises:
            OSError: the disk refused.
        """
        path = self.folder / f"{self._reached.segment:08d}.{kind}"
        with path.open("ab") as file:
            file.write(content)
        return path

    def close(self) -> None:
        """Gives the folder back, and removes it where nothing is left in it that somebody needs."""
        try:
            if self._reached >= self._end and not self.note():
                for name in (*(path.name for path in self.folder.glob("*.log")), _REACHED, _LOCK):
                    (self.folder / name).unlink(missing_ok=True)
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()
        finally:
            for descriptor in (*self._descriptors.values(), self._lock):
                os.close(descriptor)
            self._descriptors.clear()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.log"

    def _descriptor(self, number: int) -> int:
        # Kept open: what was written can be read even where the folder was deleted meanwhile.
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[number]

    def _bytes_before(self, place: Place) -> int:
        return self._begins.get(place.segment, 0) + place.offset

    def _size(self, number: int) -> int:
        following = self._after(number)
        return (self._bytes_before(self._end) if following is None else self._begins[following]) - self._begins[number]

    def _after(self, number: int) -> int | None:
        present = list(self._begins)  # in one step: the writer may begin another meanwhile
        return min((other for other in present if other > number), default=None)

    def _present(self, place: Place) -> Place:
        """The same place, in a segment that is there and has something after it, as far as there is one."""
        if place.segment in self._begins and (place.offset < self._size(place.segment) or place >= self._end):
            return place
        later = self._after(place.segment)
        return self._end if later is None else self._present(Place(later, 0))

    def _recalled(self) -> Place:
        first = Place(min(self._begins, default=0), 0)
        try:
            segment, offset = (int(word) for word in (self.folder / _REACHED).read_text().split())
        except (OSError, ValueError):
            return first  # from the start: what is safe already is known by its ids where it went
        place = Place(segment, offset)
        return self._present(max(first, min(place, self._end))) if offset >= 0 else first


def create(parent: Path, *, segment_bytes: int = 16 << 20) -> Spool:
    """A new folder in `parent`, owned by this process until it ends or closes it.

    Raises:
        OSError: the disk refused.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    hidden = parent / f".{name}"  # until it is locked, so that nobody takes it for one without an owner
    hidden.mkdir(mode=0o750)
    lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(parent / name)
        return Spool(parent / name, lock, segment_bytes=segment_bytes)
    except OSError:
        os.close(lock)
        raise


def adopt(parent: Path) -> list[Spool]:
    """The folders in `parent` whose owner is gone and in which something waits, now owned by this process.

    Raises:
        OSError: `parent` cannot be listed. A folder in it that cannot be used is told and left alone.
    """
    found: list[Spool] = []
    for folder in sorted(parent.iterdir()) if parent.exists() else ():
        if folder.name.startswith("."):
            continue
        try:
            spool = _taken_over(folder)
        except OSError as error:
            logger.warning("%s cannot be taken over: %s", folder, error)
            continue
        if spool is not None:
            found.append(spool)
    return found


def _taken_over(folder: Path) -> Spool | None:
    """The folder, locked; None where somebody owns it, or nothing waits in it: then it is tidied away."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None  # what people were left to look at, or what another process is just removing
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / _LOCK).stat()  # whoever held it until now may have removed it
        spool = Spool(folder, lock)
        waits = spool.waiting_bytes or spool.note()
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    if waits:
        return spool
    spool.close()
    return None
