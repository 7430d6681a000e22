"""Rows on their way to PostgreSQL: a bounded queue, one background thread, one connection.

Owns what is the same for everything that is logged beside a prediction: nothing waits for the database, nothing fails
with it, and what does not fit is counted. What a row is, and how it is inserted, is its user's.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case

from ml.database import connect
from ml.errors import DatabaseUnavailable

T = TypeVar("T")


@dataclass(frozen=True)
class LogState:
    """Counts of rows (one image each) since the log was opened, and whether the last write went well."""

    queued: int
    written: int
    dropped: int
    database_ok: bool


class BatchWriter(ABC, Generic[T]):
    """Takes items from the request path and writes them to PostgreSQL in the background.

    `append` never waits for the database and never fails: while PostgreSQL is away the queue holds up to `capacity`
    rows, and what does not fit is counted as dropped. What was queued is written when it is back, exactly once.

    Args:
        database_url: the predictions database.
        capacity: rows kept in memory at most.
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
        *,
        capacity: int = 20_000,
        flush_every: float = 0.2,
        batch_rows: int = 500,
        longest_pause: float = 2.0,
    ) -> None:
        self._database_url = database_url
        self._capacity = capacity
        self._flush_every = flush_every
        self._batch_rows = batch_rows
        self._longest_pause = longest_pause
        self._changed = threading.Condition()
        # All of the following is touched under `_changed` only.
        self._queue: deque[T] = deque()
        self._queued = self._written = self._dropped = 0
        self._accepted = 0  # rows ever taken into the queue
        self._settled = 0  # rows of those that have left it, written or given up
        self._database_ok = True
        self._hurry = False
        self._closing = False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def _insert(self, connection: Connection, batch: list[T]) -> None:
        """Writes items in one transaction of the connection.

        It may be called again with the same items, where the connection broke off, and must then change nothing.
        """

    @abstractmethod
    def _rows_of(self, item: T) -> int:
        """How many rows an item makes."""

    def start(self) -> None:
        """Starts the background thread. Call it in the process that predicts, not before a fork."""
        with self._changed:
            if self._thread is None:
                name = self._name.lower().replace(" ", "-")
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def append(self, item: T) -> bool:
        """Queues one item; False where the queue is full or closed and its rows are dropped."""
        rows = self._rows_of(item)
        with self._changed:
            if self._closing or self._queued + rows > self._capacity:
                self._dropped += rows
                return False
            self._queue.append(item)
            self._queued += rows
            self._accepted += rows
            self._changed.notify_all()
        return True

    def flush(self, timeout: float = 5.0) -> bool:
        """Waits until everything appended so far is in the database; False where it is not after `timeout` seconds."""
        with self._changed:
            if self._settled >= self._accepted:
                return True
            target = self._accepted
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._settled >= target, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Writes what is queued, for `timeout` seconds at most, and ends the thread. What is left is dropped."""
        written = self.flush(timeout if self._thread is not None else 0)
        with self._changed:
            self._closing = True
            if not written:
                self._logger.error("%s closed with %d rows that PostgreSQL did not take.", self._name, self._queued)
                self._give_up_queue()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def state(self) -> LogState:
        """The counts at this moment."""
        with self._changed:
            return LogState(self._queued, self._written, self._dropped, self._database_ok)

    def _run(self) -> None:
        connection: Connection | None = None
        pause = 0.0
        while batch := self._next_batch(pause):
            rows = sum(map(self._rows_of, batch))
            try:
                connection = connection or connect(self._database_url)
                self._insert(connection, batch)
            except (psycopg2.DataError, psycopg2.IntegrityError):
                # These rows can never be written; keeping them would hold up all that follow.
                self._logger.exception("%s: %d rows were refused by PostgreSQL and are dropped.", self._name, rows)
                pause = 0.0
                self._settle(batch, rows, written=False)
            except (psycopg2.Error, DatabaseUnavailable) as error:
                # Away, in recovery, or without the schema yet: whatever it is, waiting loses nothing.
                pause = min(self._longest_pause, pause * 2 or 0.1)
                self._tell_once(error)
                if connection is not None:
                    connection.close()
                    connection = None
            else:
                pause = 0.0
                self._settle(batch, rows, written=True)
        if connection is not None:
            connection.close()

    def _next_batch(self, pause: float) -> list[T]:
        """Waits for rows to write; empty when the log is closed and nothing is left."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._closing, pause)
            else:
                self._changed.wait_for(lambda: self._queue or self._closing)
                full = self._batch_rows
                self._changed.wait_for(lambda: self._queued >= full or self._hurry or self._closing, self._flush_every)
            self._hurry = False
            batch: list[T] = []
            rows = 0
            for item in self._queue:
                if batch and rows + self._rows_of(item) > self._batch_rows:
                    break
                batch.append(item)
                rows += self._rows_of(item)
            return batch

    def _tell_once(self, error: Exception) -> None:
        with self._changed:
            if self._database_ok:
                reason = " ".join(str(error).split())
                self._logger.warning("%s: %s Keeping up to %d rows meanwhile.", self._name, reason, self._capacity)
            self._database_ok = False

    def _settle(self, batch: list[T], rows: int, *, written: bool) -> None:
        with self._changed:
            if not self._queue or self._queue[0] is not batch[0]:
                return  # `close` gave up on them meanwhile
            for _ in batch:
                self._queue.popleft()
            self._queued -= rows
            self._settled += rows
            if written:
                self._written += rows
                if not self._database_ok:
                    self._logger.info("%s: PostgreSQL is back; %d rows are still queued.", self._name, self._queued)
                self._database_ok = True
            else:
                self._dropped += rows
            self._changed.notify_all()

    def _give_up_queue(self) -> None:
        self._dropped += self._queued
        self._settled += self._queued
        self._queued = 0
        self._queue.clear()
