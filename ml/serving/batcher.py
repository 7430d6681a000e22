"""Predicts the images of many requests together, and says no in time where there are too many.

Owns the queue between requests and engine: what is predicted with what, who is next, how long anybody waits. Knows no
HTTP, and of a model only that it predicts.

A request that finds nothing else under way is predicted at once, on its own thread and on all cores. What comes while
something is under way waits in line, and is taken in batches by one thread for each core. Lines are kept for each
client, and served by deficit round robin (Shreedhar and Varghese 1996, https://doi.org/10.1109/90.502236), so that a
client's batches of a hundred images delay another's single one by a few images only.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from ml.datasets.labels import NUM_CLASSES
from ml.errors import ServiceUnavailable
from ml.serving.engine import Predictor

logger = logging.getLogger(__name__)

LONGEST_BATCH = 32
"""Images. More are no faster: one core predicts VGG16 at the same pace from 8 on."""
LONGEST_LINGER = 0.005
"""Seconds that a core stands idle at most, for more images to come."""
_QUANTUM = 8
"""Images of one client before it is another's turn."""
_MEMORY = 0.2
"""Weight of the newest batch in what is remembered of batches."""


class Overloaded(ServiceUnavailable):
    """More is asked for than can be predicted in time. `retry_after`: seconds after which it may be otherwise."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, fix=f"send it again after {retry_after} s, or less at a time.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    `probabilities` is float32 (n, 10). `waited` and `computed` are seconds, in line and in the engine; `batch` is the
    number of images that were predicted together. Where a request made several batches, the slowest is told.
    """

    probabilities: np.ndarray
    waited: float
    computed: float
    batch: int


@dataclass(frozen=True)
class BatcherState:
    """Images in line, batches under way, requests refused since the start, and seconds an image takes at present."""

    queued: int
    running: int
    refused: dict[str, int]
    pace: float


@dataclass(eq=False, slots=True)
class Pending:
    """A request in line. Its pieces are predicted in any order; `receive` is called once, when there is an answer.

    `context` is its sender's, who finds there what it needs to go on.
    """

    engine: Predictor
    client: str
    receive: "Receiver"
    context: Any
    probabilities: np.ndarray
    since: float
    left: int
    over: bool = False
    error: BaseException | None = None
    waited: float = 0.0
    computed: float = 0.0
    batch: int = 0

    def answer(self) -> Answer:
        """What came of it, once it was received.

        Raises:
            Overloaded: when there was none within the deadline.
            Exception: what the engine raised on these images.
        """
        if self.error is not None:
            raise self.error
        return Answer(self.probabilities, self.waited, self.computed, self.batch)


Receiver = Callable[[list[Pending]], object]
"""Takes requests that are over, all of its own that one batch has ended; on the thread that predicted them, which goes
on to predict afterwards, while another takes its place."""


@dataclass(frozen=True)
class _Piece:
    """Rows of a request that are predicted in one go: `_QUANTUM` at most, so that turns are of the same length."""

    request: Pending
    images: np.ndarray
    start: int


@dataclass
class _Line:
    """What one client waits for, oldest first, and the images that are still its turn."""

    pieces: deque[_Piece] = field(default_factory=deque)
    images: int = 0
    credit: int = 0


class Batcher:
    """One for all requests of a process, and for all models that answer them. Safe to use from several threads at once.

    Args:
        lanes: batches that may run beside each other: as many as there are cores.
        capacity: images in line at most. One client may fill half of what is free, so that there is room for others
            (dynamic thresholds: Choudhury and Hahne 1998, https://doi.org/10.1109/90.664262).
        deadline: seconds from the question to the answer at most.
    """

    def __init__(self, *, lanes: int = 2, capacity: int = 1024, deadline: float = 5.0) -> None:
        self._lanes = lanes
        self._capacity = capacity
        self._deadline = deadline
        self._changed = threading.Condition(threading.Lock())
        # All of the following is touched under `_changed` only.
        self._lines: dict[str, _Line] = {}
        self._turns: deque[str] = deque()
        self._queued = 0
        self._running = 0  # lanes in use; a batch that has all cores uses all
        self._wanted = 1  # images in line for which a lane that waits is woken
        self._typical = 1.0  # images of a batch, of late
        self._pace = 0.0  # seconds of all lanes together for an image, of late
        self._refused = {"full": 0, "late": 0}
        self._threads: list[threading.Thread] = []
        self._closing = False

    def predict(self, engine: Predictor, images: np.ndarray, client: str = "") -> Answer:
        """Answers one request.

        Args:
            engine: the model.
            images: uint8 (n, 32, 32, 3), n at least 1.
            client: whose request it is.

        Raises:
            Overloaded: when it cannot be answered within the deadline, or was not.
            Exception: what the engine raises on these images.
        """
        with self._changed:
            idle = self._running == 0 and self._queued == 0 and len(images) <= LONGEST_BATCH
            if idle:
                self._running = self._lanes
        if idle:
            return self._predict_at_once(engine, images)
        done = threading.Lock()
        done.acquire()
        request = self.submit(engine, images, lambda _: done.release(), client=client)
        if not done.acquire(timeout=self._deadline):
            self.give_up(request)
        return request.answer()

    def submit(
        self, engine: Predictor, images: np.ndarray, receive: Receiver, context: Any = None, *, client: str = ""
    ) -> Pending:
        """Puts one request in line and does not wait: `receive` gets it once it is answered.

        Where that does not come within the deadline, it is for the caller to call `give_up`.

        Args:
            engine: the model.
            images: uint8 (n, 32, 32, 3), n at least 1.
            receive: must be quick, and wait for nobody's prediction.
            context: kept with the request.
            client: whose request it is.

        Raises:
            Overloaded: when it cannot be answered within the deadline.
        """
        with self._changed:
            return self._enqueue(engine, images, client, receive, context)

    def give_up(self, request: Pending) -> None:
        """Takes a request out of the line whose time is over: it is received with `Overloaded`, unless it was answered
        meanwhile. A piece that is under way is predicted for nothing.
        """
        with self._changed:
            if request.over:
                return
            line = self._lines.get(request.client)
            if line is not None:
                kept = deque(piece for piece in line.pieces if piece.request is not request)
                gone = sum(len(piece.images) for piece in line.pieces) - sum(len(piece.images) for piece in kept)
                line.pieces = kept
                self._take_out(request.client, line, gone)
            request.over = True
            request.error = self._refusal(
                "late", f"no answer came within {self._deadline:g} s", self._queued * self._pace
            )
        _hand_over([request])

    @property
    def deadline(self) -> float:
        """Seconds from the question to the answer at most."""
        return self._deadline

    def state(self) -> BatcherState:
        """The counts at this moment."""
        with self._changed:
            return BatcherState(self._queued, self._running, dict(self._refused), self._pace)

    def close(self, timeout: float = 2.0) -> None:
        """Predicts what is in line, for `timeout` seconds at most, and ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        ends = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _predict_at_once(self, engine: Predictor, images: np.ndarray) -> Answer:
        started = time.perf_counter()
        try:
            probabilities = engine.predict(images, alone=True)
        finally:
            seconds = time.perf_counter() - started
            with self._changed:
                self._running = 0
                self._remember(len(images), seconds)
                if self._queued:
                    self._changed.notify_all()
        return Answer(probabilities, 0.0, seconds, len(images))

    def _enqueue(self, engine: Predictor, images: np.ndarray, client: str, receive: Receiver, context: Any) -> Pending:
        n = len(images)
        line = self._lines.get(client)
        held = line.images if line is not None else 0
        expected = self._queued * self._pace
        if held + n > self._capacity - self._queued:
            raise self._refusal("full", f"{self._queued} images wait already", expected)
        if expected > self._deadline:
            raise self._refusal("late", f"an answer would take {expected:.1f} s", expected)
        if line is None:
            line = self._lines[client] = _Line()
            self._turns.append(client)
        starts = range(0, n, _QUANTUM)
        answers = np.empty((n, NUM_CLASSES), np.float32)
        request = Pending(engine, client, receive, context, answers, time.perf_counter(), len(starts))
        line.pieces.extend(_Piece(request, images[start : start + _QUANTUM], start) for start in starts)
        line.images += n
        self._queued += n
        if not self._threads:
            self._begin()
        if self._queued >= self._wanted and self._running < self._lanes:
            self._changed.notify()
        return request

    def _refusal(self, reason: str, said: str, expected: float) -> Overloaded:
        self._refused[reason] += 1
        return Overloaded(f"The server is busy: {said}.", retry_after=max(1, math.ceil(expected)))

    def _begin(self) -> None:
        # With the first request that waits: threads do not survive the fork of a server that starts its workers so.
        # One more than run at once: the next batch begins while the last one is received.
        for number in range(self._lanes + 1):
            thread = threading.Thread(target=self._run, name=f"predict-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        """A lane: takes what is in line, batch after batch."""
        while True:
            with self._changed:
                if not self._await_work():
                    return
                # What waits is shared among the lanes that are free: two halves beside each other are done sooner.
                share = math.ceil(self._queued / (self._lanes - self._running))
                batch = self._take(min(LONGEST_BATCH, share))
                alone = self._running == 0 and self._queued == 0
                used = self._lanes if alone else 1
                self._running += used
            size = sum(len(piece.images) for piece in batch)
            started = time.perf_counter()
            outcome = _predicted(batch, alone=alone)
            seconds = time.perf_counter() - started
            with self._changed:
                self._running -= used
                self._remember(size, seconds / (1 if alone else self._lanes))
                over = _settled(batch, outcome, started, seconds, size)
                if self._queued:
                    self._changed.notify_all()
            _hand_over(over)
            del batch, outcome, over  # else a lane that waits would keep a model in memory that was replaced meanwhile

    def _await_work(self) -> bool:
        """Waits for images and a free lane; False when the batcher is closed and nothing is left."""
        while True:
            self._changed.wait_for(lambda: (self._queued and self._running < self._lanes) or self._closing)
            if self._closing:
                return self._queued > 0
            if self._linger():
                return True

    def _linger(self) -> bool:
        """Waits a moment for a batch of half the size of late; False where others took what there was.

        Callers who were answered together ask again together: without this, the first of them would be predicted by
        itself while all others wait for it. Where batches are of one image, nobody waits.
        """
        goal = min(LONGEST_BATCH, int(self._typical / 2))
        if self._queued < goal:
            self._wanted = goal
            self._changed.wait_for(lambda: self._queued >= goal or self._closing, LONGEST_LINGER)
            self._wanted = 1
        return self._queued > 0 and self._running < self._lanes

    def _take(self, most: int) -> list[_Piece]:
        """The next pieces, of one model: at most so many images together, but one piece at least."""
        batch: list[_Piece] = []
        room, passed = most, 0
        while self._turns and room > 0 and passed < len(self._turns):
            line = self._lines[self._turns[0]]
            piece = line.pieces[0]
            n = len(piece.images)
            fits = n <= room and piece.request.engine is batch[0].request.engine if batch else True
            if not fits:
                self._turns.rotate(-1)
                passed += 1
            elif line.credit < n and len(self._turns) > 1:
                line.credit += _QUANTUM
                self._turns.rotate(-1)
                passed = 0
            else:
                batch.append(line.pieces.popleft())
                line.credit = max(0, line.credit - n)
                room -= n
                self._take_out(self._turns[0], line, n)
        return batch

    def _take_out(self, client: str, line: _Line, images: int) -> None:
        line.images -= images
        self._queued -= images
        if not line.pieces:
            del self._lines[client]
            self._turns.remove(client)

    def _remember(self, size: int, seconds: float) -> None:
        self._typical += _MEMORY * (size - self._typical)
        self._pace += _MEMORY * (seconds / size - self._pace)


def _predicted(batch: list[_Piece], *, alone: bool) -> list[np.ndarray | BaseException]:
    """For each piece its rows, or what the engine raised on it."""
    engine = batch[0].request.engine
    if len(batch) == 1:
        return [_tried(lambda: engine.predict(batch[0].images, alone=alone))]
    together = _tried(lambda: engine.predict(np.concatenate([piece.images for piece in batch]), alone=alone))
    if isinstance(together, BaseException):
        # One request's images must not fail another's: each has a try of its own.
        return [_tried(lambda piece=piece: engine.predict(piece.images, alone=alone)) for piece in batch]  # type: ignore[misc]
    ends = np.cumsum([len(piece.images) for piece in batch])
    return [together[end - len(piece.images) : end] for piece, end in zip(batch, ends, strict=True)]


def _tried(predict: Callable[[], np.ndarray]) -> np.ndarray | BaseException:
    try:
        return predict()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's whose images they were
        return error


def _settled(
    batch: list[_Piece], outcome: list[np.ndarray | BaseException], started: float, seconds: float, size: int
) -> list[Pending]:
    """Notes what came of each piece; the requests that have all of theirs now."""
    over = []
    for piece, rows in zip(batch, outcome, strict=True):
        request = piece.request
        if isinstance(rows, BaseException):
            request.error = request.error or rows
        else:
            request.probabilities[piece.start : piece.start + len(rows)] = rows
        if seconds >= request.computed:
            request.computed, request.batch = seconds, size
        request.waited = max(request.waited, started - request.since)
        request.left -= 1
        if request.left == 0 and not request.over:
            request.over = True
            over.append(request)
    return over


def _hand_over(requests: list[Pending]) -> None:
    for receive, theirs in groupby(requests, key=lambda request: request.receive):
        try:
            receive(list(theirs))
        except Exception:
            # A lane that dies unseen would never predict again.
            logger.exception("Predictions were not received")
