"""Decides which model answers a request, and shows the challenger what it is to see.

Owns the two promises to callers: what the challenger does or fails to do costs nobody an answer, and a request is
mirrored after it was answered, in the background, or not at all. Who the models are is `ml.serving.hot_swap`'s; what
becomes of a mirrored request is its receiver's.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

import numpy as np

from ml.errors import CifarError
from ml.serving.batcher import LONGEST_BATCH, Answer, Batcher, Overloaded
from ml.serving.hot_swap import Challenger, FollowerState, LoadedModel
from ml.traffic import Mirrored, Mode

logger = logging.getLogger(__name__)

_TRIAL_SECONDS = 1.0
"""A canary that is slower does not answer: the champion does."""


class Follower(Protocol):
    """As `ml.serving.hot_swap.ChampionFollower`."""

    def current(self) -> LoadedModel:
        """The champion; ServiceUnavailable where none is loaded."""

    def state(self) -> FollowerState:
        """What has happened so far; the challenger, if any, is in it."""


@dataclass(frozen=True)
class Counts:
    """What one version did as the challenger since the server started, in images.

    `answered`: of callers' requests. `mirrored`: predicted unseen, or failed on; `disagreed`: of those, the images of
    which it said another class. `failed`: it raised, in whichever mode. `dropped`: not mirrored, since the queue was
    full.
    """

    answered: int = 0
    mirrored: int = 0
    disagreed: int = 0
    failed: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class RouterState:
    """Images that wait to be mirrored, and the counts of each version that has been the challenger."""

    queued: int
    counts: Mapping[int, Counts]


@dataclass(frozen=True)
class _Waiting:
    """A request that was answered and is to be mirrored."""

    request_id: UUID
    answered_at: datetime
    champion_version: int
    champion_classes: np.ndarray
    champion_ms: float
    images: np.ndarray
    challenger: LoadedModel


def _keep_nothing(_: Mirrored) -> None:
    """For a server that keeps no shadow log."""


class Router:
    """Answers requests. Safe to use from several threads at once.

    Args:
        follower: gives the champion, and the challenger while traffic is meant for it.
        batcher: predicts the images of several requests together.
        trial: the same for the challenger: one that is slow fills its own line, and none of the champion's.
        record: is handed each mirrored request, on the background thread; must not wait.
        capacity: images that wait to be mirrored at most; an image is 3.1 kB. What does not fit is dropped and counted.
    """

    def __init__(
        self,
        follower: Follower,
        batcher: Batcher | None = None,
        *,
        trial: Batcher | None = None,
        record: Callable[[Mirrored], object] = _keep_nothing,
        capacity: int = 1000,
    ) -> None:
        self._follower = follower
        self.batcher = batcher or Batcher()
        self._trial = trial or Batcher(lanes=1, deadline=_TRIAL_SECONDS)
        self._record = record
        self._capacity = capacity
        self._changed = threading.Condition()
        # All of the following is touched under `_changed` only.
        self._queue: deque[_Waiting] = deque()
        self._queued = 0  # the one that is being predicted included
        self._counts: dict[int, Counts] = {}
        self._told: set[int] = set()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to mirror in a background thread. Call it in the process that predicts, not before a fork."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()

    def predict(self, request_id: UUID, images: np.ndarray, client: str = "") -> tuple[LoadedModel, Answer]:
        """Answers one request.

        Args:
            request_id: decides, where a challenger gets a share of the traffic, whether this request is in it.
            images: uint8 (n, 32, 32, 3), n at least 1.
            client: whose request it is; clients take turns where there is a line.

        Returns:
            The model that answered, and what it said. A canary that fails on the images does not answer: the champion
            does.

        Raises:
            ServiceUnavailable: when no champion is loaded; `Overloaded` where too many images wait.
            ModelInvalid: when the champion fails on these images.
        """
        champion = self._follower.current()
        canary = self._challenger_for(request_id, "canary")
        if canary is not None and (tried := self._try(canary, images, client)) is not None:
            return canary, tried
        answer = self.batcher.predict(champion.engine, images, client)
        shown = self._challenger_for(request_id, "mirror")
        if shown is not None and shown.version != champion.version:
            self._put(
                _Waiting(
                    request_id=request_id,
                    answered_at=datetime.now(UTC),
                    champion_version=champion.version,
                    champion_classes=answer.probabilities.argmax(axis=1),
                    champion_ms=1000 * answer.computed * len(images) / answer.batch,
                    images=images,
                    challenger=shown,
                )
            )
        return champion, answer

    def undivided(self) -> LoadedModel | None:
        """The champion where it answers everything, and None where a challenger has a part in the traffic.

        Raises:
            ServiceUnavailable: when no champion is loaded.
        """
        challenger = self._follower.state().challenger
        if challenger is not None and challenger.traffic is not None:
            return None
        return self._follower.current()

    def state(self) -> RouterState:
        """The counts at this moment."""
        with self._changed:
            return RouterState(self._queued, dict(self._counts))

    def flush(self, timeout: float = 5.0) -> bool:
        """Waits until everything so far is mirrored; False where it is not after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._queued == 0, timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Mirrors what waits, for `timeout` seconds at most, and ends the thread. What is left is dropped, counted."""
        ends = time.monotonic() + timeout
        if self._thread is not None:
            self.flush(timeout)
        with self._changed:
            self._closing = True
            while self._queue:
                self._drop(self._queue.pop())
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.0, ends - time.monotonic()))

    def _challenger_for(self, request_id: UUID, mode: Mode) -> LoadedModel | None:
        challenger: Challenger | None = self._follower.state().challenger
        if challenger is None or challenger.model is None or challenger.traffic is None:
            return None
        traffic = challenger.traffic
        return challenger.model if traffic.mode == mode and traffic.chooses(request_id) else None

    def _try(self, canary: LoadedModel, images: np.ndarray, client: str) -> Answer | None:
        try:
            answer = self._trial.predict(canary.engine, images, client)
        except Exception as error:  # noqa: BLE001 - however a canary fails, the champion answers
            self._tell_once(canary, error)
            self._count(canary.version, failed=len(images))
            return None
        self._count(canary.version, answered=len(images))
        return answer

    def _put(self, item: _Waiting) -> None:
        with self._changed:
            fits = not self._closing and self._queued + len(item.images) <= self._capacity
            self._queued += len(item.images)
            if fits:
                self._queue.append(item)
                self._changed.notify_all()
            else:
                self._drop(item)

    def _drop(self, item: _Waiting) -> None:
        self._queued -= len(item.images)
        self._count(item.challenger.version, dropped=len(item.images))

    def _run(self) -> None:
        while items := self._next():
            try:
                self._show(items)
            except Exception:
                # A thread that dies unseen would never mirror again.
                logger.exception("%d requests were not mirrored", len(items))
            finally:
                with self._changed:
                    self._queued -= sum(len(item.images) for item in items)
                    self._changed.notify_all()

    def _next(self) -> list[_Waiting]:
        """Waits for requests to mirror, and takes as many as fit into a batch; empty when the router is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            items: list[_Waiting] = []
            room = LONGEST_BATCH
            while self._queue and (not items or len(self._queue[0].images) <= room):
                if items and self._queue[0].challenger is not items[0].challenger:
                    break
                items.append(self._queue.popleft())
                room -= len(items[-1].images)
            return items

    def _show(self, items: list[_Waiting]) -> None:
        challenger = items[0].challenger
        try:
            answer = self._ask(challenger, items)
        except Overloaded:
            self._count(challenger.version, dropped=sum(len(item.images) for item in items))
            return
        except Exception as error:  # noqa: BLE001 - that it fails, however it does, is what mirroring is to find out
            if len(items) > 1:  # on which of them?
                for item in items:
                    self._show([item])
                return
            self._tell_once(challenger, error)
            failure = error.message if isinstance(error, CifarError) else f"{type(error).__name__}: {error}"
            self._keep(_mirrored(items[0], None, None, failure))
            return
        each = 1000 * answer.computed / answer.batch
        start = 0
        for item in items:
            rows = answer.probabilities[start : start + len(item.images)]
            self._keep(_mirrored(item, rows, each * len(rows), None))
            start += len(rows)

    def _ask(self, challenger: LoadedModel, items: list[_Waiting]) -> Answer:
        images = np.concatenate([item.images for item in items])
        return self._trial.predict(challenger.engine, images)

    def _keep(self, mirrored: Mirrored) -> None:
        n = len(mirrored.champion_classes)
        failed = n if mirrored.failure is not None else 0
        self._count(mirrored.challenger_version, mirrored=n, disagreed=mirrored.disagreements, failed=failed)
        try:
            self._record(mirrored)
        except Exception:
            logger.exception("A mirrored request was not kept")  # the others of its batch are

    def _count(self, version: int, **images: int) -> None:
        with self._changed:
            before = self._counts.get(version, Counts())
            self._counts[version] = replace(before, **{name: getattr(before, name) + n for name, n in images.items()})

    def _tell_once(self, challenger: LoadedModel, error: Exception) -> None:
        with self._changed:
            known = challenger.version in self._told
            self._told.add(challenger.version)
        if not known:
            logger.warning("Challenger version %d fails: %s Told once; see its counts.", challenger.version, error)


def _mirrored(
    item: _Waiting, probabilities: np.ndarray | None, milliseconds: float | None, failure: str | None
) -> Mirrored:
    return Mirrored(
        request_id=item.request_id,
        created_at=item.answered_at,
        champion_version=item.champion_version,
        challenger_version=item.challenger.version,
        champion_classes=item.champion_classes,
        champion_ms=item.champion_ms,
        probabilities=probabilities,
        challenger_ms=milliseconds,
        failure=failure,
    )
