"""Rows on their way to PostgreSQL: appended to files on the request path, written by one background thread.

Owns what is the same for everything that is logged beside a prediction. Nothing waits for the database, nothing fails
with it, and nothing that was taken is lost: the disk is the queue (`ml.monitoring.spool`), so what waits survives the
end of the process and is written by the next one, exactly once. What a row is, how it is inserted, and how a repetition
is recognised is its user's.

Where the disk fails or stalls, rows wait in memory instead; where neither has room they are dropped, and it is said how
many (`ml.monitoring.gaps`). Bytes that are no record, and rows that PostgreSQL refuses for ever, are kept aside in the
folder and hold up nobody.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from uuid import uuid4

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case

from ml.database import connect
from ml.errors import CifarError
from ml.monitoring import spool
from ml.monitoring.gaps import Gap, gaps_from_json, gaps_to_json, insert_gaps
from ml.monitoring.spool import Damage, Place, Record, Spool, framed

T = TypeVar("T")

# Seconds that a request waits for another one's write. Where cores are few, a thread that has written may wait for tens
# of milliseconds for its turn; that is no stalled disk, and what waits in memory is lost to a kill.
_STALLED_AFTER = 0.1
_DISK_PAUSE = 1.0  # seconds without another try, once the disk failed, or stalled and is no better
_READS_BEFORE_SKIPPING = 5
_LOOK_FOR_ORPHANS_EVERY = 60.0
_ASIDE_SHARE = 16  # of the spool's bytes, at most, for what is kept aside
_EPISODE_ENDS_AFTER = 2.0
_EPISODE_LASTS = 600.0

_SPOOL_FULL = "the spool is full"
_MEMORY_FULL = "the disk takes nothing and the memory for it is full"
_CLOSED = "the log was closed"
_REFUSED = "PostgreSQL refuses the rows"
_DAMAGED = "the spool was damaged"


@dataclass(frozen=True)
class LogState:
    """Counts of rows (one image each) since the log was opened, and how it fares.

    Attributes:
        queued: taken and not written yet; what earlier processes left is in `spool_bytes` alone.
        written: in the database.
        dropped: lost, since neither disk nor memory had room.
        database_ok: whether the last write went well.
        unspooled: waited in memory, since the disk failed or stalled.
        refused: kept aside, since PostgreSQL refused them for ever.
        damaged: places in the spool that hold no record, and were stepped over.
        spool_bytes: wait on disk, of earlier processes too.
        spool_limit: as many may.
        spool_ok: whether the disk took the last record.
    """

    queued: int
    written: int
    dropped: int
    database_ok: bool
    unspooled: int = 0
    refused: int = 0
    damaged: int = 0
    spool_bytes: int = 0
    spool_limit: int = 0
    spool_ok: bool = True


@dataclass
class _Episode:
    """A gap that may still grow; the monotonic times tell when it is over, whatever the clock on the wall does."""

    gap: Gap
    began: float
    latest: float


@dataclass(frozen=True)
class _Batch(Generic[T]):
    """Records to be written in one transaction, and where they come from: a spool, or the memory."""

    records: list[Record]
    source: Spool | None
    damages: list[Damage]
    end: Place

    @property
    def rows(self) -> int:
        return sum(record.rows for record in self.records)


class BatchWriter(ABC, Generic[T]):
    """Takes items from the request path and writes them to PostgreSQL in the background.

    `append` never waits for the database and never fails. What it took is written exactly once, in order, also when
    the process is killed meanwhile: the next process that opens the folder goes on.

    Args:
        database_url: the predictions database.
        folder: for the files; may be shared with other processes, each of which keeps to a folder of its own in it.
        spool_bytes: wait on disk at most.
        capacity: rows kept in memory at most, while the disk takes none.
        flush_every: seconds until a row is written at the latest, where the database answers.
        batch_rows: rows written in one transaction at most; so many waiting are written at once.
        longest_pause: seconds between two tries at most, while the database is away.
    """

    _logger: ClassVar[logging.Logger]
    """Where an outage is told, and its end."""
    _name: ClassVar[str]
    """What the log is called there; in lower case and with dashes it is the thread's name."""

    def __init__(
        self,
        database_url: str,
        folder: Path,
        *,
        spool_bytes: int = 1 << 30,
        capacity: int = 10_000,
        flush_every: float = 0.2,
        batch_rows: int = 500,
        longest_pause: float = 2.0,
    ) -> None:
        self._database_url = database_url
        self._folder = folder
        self._spool_bytes = spool_bytes
        self._capacity = capacity
        self._flush_every = flush_every
        self._batch_rows = batch_rows
        self._longest_pause = longest_pause
        # Held while a record is written; a request waits no longer for it than `_STALLED_AFTER`.
        self._disk = threading.Lock()
        self._spool: Spool | None = None
        self._disk_again = 0.0  # monotonic: until then nothing is tried on the disk
        # Of processes that are gone, read before what is our own; the background thread's alone.
        self._orphans: deque[Spool] = deque()
        self._orphan_bytes = 0
        self._look_again = 0.0
        self._failed_reads = 0
        self._aside_bytes = 0
        self._inherited: list[Gap] = []
        self._noted = ""
        # All of the following is touched under `_changed` only.
        self._changed = threading.Condition()
        self._memory: deque[tuple[Place, Record]] = deque()
        self._memory_rows = 0
        self._accepted = self._settled = 0  # rows of this process: ever taken, and no longer waiting
        self._written = self._dropped = self._unspooled = self._refused = self._damaged = 0
        self._episodes: dict[str, _Episode] = {}
        self._over: list[Gap] = []
        self._database_ok = self._spool_ok = True
        self._replaying = False
        self._resting = False
        self._hurry = False
        self._closing = False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def _encode(self, item: T) -> bytes:
        """The item's bytes."""

    @abstractmethod
    def _decode(self, payload: bytes, rows: int) -> T:
        """The item that `_encode` was given; ValueError where the bytes are none."""

    @abstractmethod
    def _insert(self, cursor: Any, items: list[T]) -> None:
        """Writes items in the transaction of the cursor.

        It may be called again with items that are in the database already, and must then change nothing.
        """

    @abstractmethod
    def _rows_of(self, item: T) -> int:
        """How many rows an item makes."""

    def start(self) -> None:
        """Takes a folder and starts the background thread. Call it in the process that predicts, not before a fork."""
        with self._changed:
            if self._thread is not None:
                return
            self._replaying = True
            name = self._name.lower().replace(" ", "-")
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        with self._disk:
            try:
                self._open_spool()
            except OSError as error:
                self._disk_failed(error)
        self._thread.start()

    def append(self, item: T) -> bool:
        """Takes one item; False where there is no room for it, or the log is closed, and its rows are dropped.

        When it returns True, the item outlives the process, unless the disk failed or stalled (`unspooled`).
        """
        rows = self._rows_of(item)
        record = framed(self._encode(item), rows)
        if self._closing:
            return self._drop(rows, _CLOSED)
        if time.monotonic() >= self._disk_again:
            if self._disk.acquire(timeout=_STALLED_AFTER):
                try:
                    own = self._spool or self._open_spool()
                    if own.waiting_bytes + self._orphan_bytes + len(record) > self._spool_bytes:
                        return self._drop(rows, _SPOOL_FULL)
                    own.append(record)
                except OSError as error:
                    self._disk_failed(error)
                else:
                    self._disk_again = 0.0  # the write that others took for a stalled one is over
                    self._taken(rows)
                    return True
                finally:
                    self._disk.release()
            else:
                self._disk_failed(TimeoutError(f"another write takes longer than {_STALLED_AFTER * 1000:.0f} ms"))
        return self._keep_in_memory(Record(record[spool.HEADER_BYTES :], rows, record))

    def flush(self, timeout: float = 5.0) -> bool:
        """Waits until everything that was appended so far, and what earlier processes left, is in the database.

        Returns:
            False where it is not after `timeout` seconds.
        """
        with self._changed:
            target = self._accepted
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._settled >= target and not self._replaying, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Ends the thread, after it has tried for `timeout` seconds to write what waits.

        What then still waits on disk is left to the next process; what waits in memory goes to the disk, or is dropped
        where that takes it no more.
        """
        if self._thread is not None:
            self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._thread is None or not self._thread.is_alive():
            self._give_back()

    def state(self) -> LogState:
        """The counts at this moment."""
        own = self._spool
        with self._changed:
            return LogState(
                queued=max(0, self._accepted - self._settled),
                written=self._written,
                dropped=self._dropped,
                database_ok=self._database_ok,
                unspooled=self._unspooled,
                refused=self._refused,
                damaged=self._damaged,
                spool_bytes=self._orphan_bytes + (own.waiting_bytes if own is not None else 0),
                spool_limit=self._spool_bytes,
                spool_ok=self._spool_ok,
            )

    # --- on the request path

    def _open_spool(self) -> Spool:
        # Short files under a small bound: the file that is being written is not deleted before it is full.
        segment_bytes = max(64 << 10, min(16 << 20, self._spool_bytes // 16))
        self._spool = spool.create(self._folder, segment_bytes=segment_bytes)
        return self._spool

    def _taken(self, rows: int) -> None:
        with self._changed:
            self._accepted += rows
            if not self._spool_ok:
                self._spool_ok = True
                self._logger.info("%s: the disk takes records again.", self._name)
            if self._resting or (self._accepted - self._settled) % self._batch_rows < rows:
                self._changed.notify_all()

    def _disk_failed(self, error: OSError) -> None:
        self._disk_again = time.monotonic() + _DISK_PAUSE
        with self._changed:
            if self._spool_ok:
                self._logger.error(
                    "%s: the spool in %s takes nothing (%s). Up to %d rows are kept in memory meanwhile.",
                    *(self._name, self._folder, error, self._capacity),
                )
            self._spool_ok = False

    def _keep_in_memory(self, record: Record) -> bool:
        with self._changed:
            if self._memory_rows + record.rows <= self._capacity:
                own = self._spool
                self._memory.append((own.end if own is not None else Place(0, 0), record))
                self._memory_rows += record.rows
                self._accepted += record.rows
                self._unspooled += record.rows
                self._changed.notify_all()
                return True
        return self._drop(record.rows, _MEMORY_FULL)

    def _drop(self, rows: int, reason: str) -> bool:
        with self._changed:
            self._dropped += rows
            if self._missing(rows, reason):
                self._logger.error("%s: rows are dropped and counted, since %s.", self._name, reason)
        return False

    def _missing(self, rows: int, reason: str) -> bool:
        """Notes rows that are lost; True where that begins an episode. Under `_changed`."""
        wall, now = datetime.now(UTC), time.monotonic()
        episode = self._episodes.get(reason)
        if episode is None:
            gap = Gap(str(uuid4()), self._name, wall, wall, rows, reason)
            self._episodes[reason] = _Episode(gap, now, now)
            self._changed.notify_all()
            return True
        episode.gap = replace(episode.gap, ended_at=max(wall, episode.gap.began_at), rows=episode.gap.rows + rows)
        episode.latest = now
        return False

    # --- in the background

    def _run(self) -> None:
        connection: Connection | None = None
        pause = 0.0
        while self._wait(pause):
            self._note_gaps()
            try:
                self._adopt()
                batch = self._next_batch()
                gaps = self._gaps_that_are_over()
                if batch.records or gaps:
                    connection = connection or connect(self._database_url)
                refused = self._write(connection, batch, gaps)
            except (psycopg2.Error, CifarError) as error:
                # Away, in recovery, or without the schema yet: whatever it is, waiting loses nothing.
                pause = min(self._longest_pause, pause * 2 or 0.1)
                self._tell_once(error)
                if connection is not None:
                    connection.close()
                    connection = None
            except OSError as error:
                pause = min(self._longest_pause, pause * 2 or 0.1)
                self._reading_failed(error)
            else:
                pause = 0.0
                self._failed_reads = 0
                self._settle(batch, refused, gaps)
        self._note_gaps()
        if connection is not None:
            connection.close()

    def _wait(self, pause: float) -> bool:
        """Waits until there is something to do; False when the log is closed."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._closing, pause)
            elif not self._replaying:
                self._resting = True
                self._changed.wait_for(self._has_work, _LOOK_FOR_ORPHANS_EVERY)
                self._resting = False
                full = self._batch_rows
                self._changed.wait_for(
                    lambda: self._accepted - self._settled >= full or self._hurry or self._closing, self._flush_every
                )
            self._hurry = False
            return not self._closing

    def _has_work(self) -> bool:
        return bool(self._accepted > self._settled or self._hurry or self._closing or self._episodes or self._over)

    def _adopt(self) -> None:
        """Takes over what processes left that are gone."""
        if time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + _LOOK_FOR_ORPHANS_EVERY
        try:
            aside = [path for kind in ("refused", "corrupt") for path in self._folder.glob(f"*/*.{kind}")]
            self._aside_bytes = sum(path.stat().st_size for path in aside)
            orphans = spool.adopt(self._folder)
        except OSError as error:
            self._logger.warning("%s: %s cannot be looked through: %s", self._name, self._folder, error)
            orphans = []
        for orphan in orphans:
            try:
                self._inherited += gaps_from_json(orphan.note())
            except (OSError, ValueError) as error:
                self._logger.error("%s: what %s says of lost rows cannot be read: %s", self._name, orphan.folder, error)
            waiting = orphan.waiting_bytes
            self._logger.info("%s: %d bytes in %s are of a process that is gone.", self._name, waiting, orphan.folder)
            self._orphans.append(orphan)
            self._orphan_bytes += waiting
        with self._changed:
            self._replaying = bool(self._orphans)
            self._changed.notify_all()

    def _next_batch(self) -> _Batch[T]:
        """What comes next: of processes that are gone, then our own in the order in which it came."""
        if self._orphans:
            orphan = self._orphans[0]
            reading = orphan.read(self._batch_rows)
            return _Batch(reading.records, orphan, reading.damages, reading.end)
        own = self._spool
        with self._changed:
            waiting = list(self._memory)
        if own is not None:
            reading = own.read(self._batch_rows, before=waiting[0][0] if waiting else None)
            if reading.records or reading.damages:
                return _Batch(reading.records, own, reading.damages, reading.end)
        records: list[Record] = []
        rows = 0
        for place, record in waiting:
            if place > waiting[0][0] or (records and rows + record.rows > self._batch_rows):
                break  # something on the disk comes in between
            records.append(record)
            rows += record.rows
        return _Batch(records, None, [], Place(0, 0))

    def _write(self, connection: Connection | None, batch: _Batch[T], gaps: list[Gap]) -> list[Record]:
        """Writes a batch; returns what of it can never be written."""
        items, refused = [], []
        for record in batch.records:
            try:
                items.append((record, self._decode(record.payload, record.rows)))
            except ValueError:
                refused.append(record)
        if connection is not None:
            refused += self._insert_or_halve(connection, items)
            if gaps:
                with connection, connection.cursor() as cursor:
                    insert_gaps(cursor, gaps)
        return refused

    def _insert_or_halve(self, connection: Connection, items: list[tuple[Record, T]]) -> list[Record]:
        """Writes items in one transaction or, where PostgreSQL refuses one of them, the halves by themselves."""
        if not items:
            return []
        try:
            with connection, connection.cursor() as cursor:
                self._insert(cursor, [item for _, item in items])
        except (psycopg2.DataError, psycopg2.IntegrityError, ValueError, OverflowError) as error:
            if len(items) == 1:
                reason = " ".join(str(error).split())
                self._logger.error("%s: PostgreSQL refuses a record for ever: %s", self._name, reason)
                return [items[0][0]]
            half = len(items) // 2
            return self._insert_or_halve(connection, items[:half]) + self._insert_or_halve(connection, items[half:])
        return []

    def _settle(self, batch: _Batch[T], refused: list[Record], gaps: list[Gap]) -> None:
        """The batch is in the database: nothing of it waits any more."""
        self._keep_aside(batch, refused)
        if batch.source is not None:
            before = batch.source.waiting_bytes
            try:
                batch.source.pass_to(batch.end)
            except OSError as error:
                self._logger.warning("%s: how far the spool is written could not be kept: %s", self._name, error)
            if self._orphans and batch.source is self._orphans[0]:
                self._orphan_bytes -= before - batch.source.waiting_bytes
                self._end_orphan()
        refused_rows = sum(record.rows for record in refused)
        told = {gap.id for gap in gaps}
        self._inherited = [gap for gap in self._inherited if gap.id not in told]
        with self._changed:
            if batch.source is None:
                for _ in batch.records:
                    self._memory_rows -= self._memory.popleft()[1].rows
            if batch.source is None or batch.source is self._spool:
                self._settled += batch.rows
            self._written += batch.rows - refused_rows
            self._refused += refused_rows
            damaged = sum(not damage.torn for damage in batch.damages)
            self._damaged += damaged
            if damaged:
                self._missing(damaged, _DAMAGED)  # at least one row each; nobody can say how many
            if refused_rows:
                self._missing(refused_rows, _REFUSED)
            self._over = [gap for gap in self._over if gap.id not in told]
            if batch.records and not self._database_ok:
                waiting = self._accepted - self._settled
                self._logger.info("%s: PostgreSQL is back; %d rows are still queued.", self._name, waiting)
                self._database_ok = True
            self._replaying = bool(self._orphans)
            self._changed.notify_all()

    def _keep_aside(self, batch: _Batch[T], refused: list[Record]) -> None:
        for record in refused:
            self._set_aside(batch.source, record.framed, "refused")
        for damage in batch.damages:
            if damage.torn:
                self._logger.warning("%s: a record that was cut off at %d bytes is skipped; it was not answered.",
                                     self._name, len(damage.content))  # fmt: skip
            else:
                self._set_aside(batch.source, damage.content, "corrupt")
                self._logger.error("%s: %d bytes of the spool are no records.", self._name, len(damage.content))

    def _end_orphan(self) -> None:
        orphan = self._orphans[0]
        if orphan.waiting_bytes:
            return
        self._note_gaps()
        try:
            orphan.keep_note("")
            orphan.close()
        except OSError as error:
            self._logger.warning("%s: %s is written out and could not be removed: %s", self._name, orphan.folder, error)
        self._orphans.popleft()

    def _reading_failed(self, error: OSError) -> None:
        """The disk could not be read. What stays unreadable is given up, so that what follows is written."""
        self._failed_reads += 1
        if self._failed_reads == 1:
            self._logger.error("%s: the spool cannot be read: %s", self._name, error)
        source = self._orphans[0] if self._orphans else self._spool
        if self._failed_reads < _READS_BEFORE_SKIPPING or source is None:
            return
        self._failed_reads = 0
        before = source.waiting_bytes
        try:
            with self._disk:
                aside = source.skip_segment()
        except OSError:
            aside = None
        lost = before - source.waiting_bytes
        self._logger.error("%s: gave up on %d bytes that cannot be read (%s).", self._name, lost, aside or "not kept")
        if source is not self._spool:
            self._orphan_bytes -= lost
            self._end_orphan()
        with self._changed:
            self._damaged += 1
            self._missing(1, _DAMAGED)

    def _set_aside(self, source: Spool | None, content: bytes, kind: str) -> None:
        where = source or self._spool
        try:
            if where is None or self._aside_bytes + len(content) > self._spool_bytes // _ASIDE_SHARE:
                raise OSError("there is no room for it")
            path = where.set_aside(content, kind)
        except OSError as error:
            self._logger.error("%s: %d bytes are not kept aside: %s", self._name, len(content), error)
        else:
            self._aside_bytes += len(content)
            self._logger.error("%s: %d bytes are kept aside in %s.", self._name, len(content), path)

    def _tell_once(self, error: Exception) -> None:
        with self._changed:
            if self._database_ok:
                reason = " ".join(str(error).split())
                limit = self._spool_bytes / 1e6
                self._logger.warning("%s: %s Keeping up to %.0f MB on disk meanwhile.", self._name, reason, limit)
            self._database_ok = False

    # --- what is missing

    def _gaps_that_are_over(self) -> list[Gap]:
        now = time.monotonic()
        with self._changed:
            for reason, episode in list(self._episodes.items()):
                if now - episode.latest >= _EPISODE_ENDS_AFTER or now - episode.began >= _EPISODE_LASTS:
                    self._over.append(self._episodes.pop(reason).gap)
            return self._inherited + self._over

    def _note_gaps(self) -> None:
        """Keeps on disk what PostgreSQL has not been told of lost rows yet."""
        with self._changed:
            gaps = self._inherited + self._over + [episode.gap for episode in self._episodes.values()]
        content = gaps_to_json(gaps)
        if self._spool is None or content == self._noted:
            return
        try:
            self._spool.keep_note(content)
        except OSError as error:
            self._logger.debug("%s: the note of lost rows waits for the disk: %s", self._name, error)
        else:
            self._noted = content

    def _give_back(self) -> None:
        """Leaves everything that waits to the next process."""
        with self._disk, self._changed:
            own, waiting = self._spool, [record for _, record in self._memory]
            lost = 0
            for record in waiting:
                try:
                    own = own or self._open_spool()
                    own.append(record.framed)
                except OSError:
                    lost += record.rows
            self._memory.clear()
            if lost:
                self._dropped += lost
                self._missing(lost, _MEMORY_FULL)
            left = max(0, self._accepted - self._settled - lost)
        if lost:
            self._logger.error("%s closed with %d rows in memory that the disk did not take.", self._name, lost)
        if left:
            self._logger.warning("%s closed with %d rows in %s for the next process.", self._name, left, self._folder)
        self._note_gaps()
        for source in (*self._orphans, *([own] if own is not None else [])):
            try:
                source.close()
            except OSError as error:
                self._logger.warning("%s: %s could not be given back: %s", self._name, source.folder, error)
        self._orphans.clear()
        self._spool = None
