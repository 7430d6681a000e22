"""The server with a folder in the registry's place, and a log in memory, for tests and for a look without a stack.

`python -m deploy.server.testing FOLDER PORT` serves what `FolderSource.crown` put there.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from flask import Flask

from deploy.server.__main__ import listen
from deploy.server.app import FAST_PATH, create_app
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.bridge import Bridge
from deploy.server.json_logging import configure
from ml.errors import DatabaseUnavailable, PredictionNotFound
from ml.monitoring.batch_writer import LogState
from ml.monitoring.prediction_log import LoggedPrediction
from ml.serving.engine import Predictor, ServingEngine
from ml.serving.hot_swap import ChampionFollower
from ml.serving.router import Router
from ml.serving.testing import FolderSource
from ml.settings import Settings
from ml.traffic import Mirrored

FOLDER = "SERVED_FOLDER"
"""The environment's word for the folder."""


class MemoryLog:
    """Keeps predictions and feedback in lists. Set `away` to play a database that is gone."""

    def __init__(self) -> None:
        self.predictions: list[LoggedPrediction] = []
        self.feedback: dict[tuple[UUID, int], int] = {}
        self.away = False

    def append(self, prediction: LoggedPrediction) -> bool:
        """Keeps it."""
        self.predictions.append(prediction)
        return True

    def record_feedback(self, request_id: UUID, index: int, label: int) -> bool:
        """Keeps it; see `PredictionLog`."""
        if self.away:
            raise DatabaseUnavailable("PostgreSQL at db.internal:5432 could not be asked.", fix="start it.")
        if not any(p.request_id == request_id and index < len(p.images) for p in self.predictions):
            raise PredictionNotFound(f"No prediction {request_id} is in the log.", fix="send an id that is.")
        first = (request_id, index) not in self.feedback
        self.feedback[request_id, index] = label
        return first

    def state(self) -> LogState:
        """Counts."""
        return LogState(0, sum(len(p.images) for p in self.predictions), 0, not self.away)


class MemoryShadows:
    """Keeps what was mirrored in a list."""

    def __init__(self) -> None:
        self.mirrored: list[Mirrored] = []

    def append(self, mirrored: Mirrored) -> bool:
        """Keeps it."""
        self.mirrored.append(mirrored)
        return True

    def state(self) -> LogState:
        """Counts."""
        return LogState(0, sum(len(item.champion_classes) for item in self.mirrored), 0, database_ok=True)


def app_of(folder: str, load: Callable[[Path], Predictor] = ServingEngine) -> Flask:
    """An app that follows champion and challenger in `folder`, looking twenty times a second."""
    configure()
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    follower = ChampionFollower(FolderSource(Path(folder)), Path(folder), every=0.05, load=load)
    shadows = MemoryShadows()
    router = Router(follower, record=shadows.append)
    app = create_app(settings, follower=follower, log=MemoryLog(), router=router, shadows=shadows)
    router.start()
    follower.start()
    return app


def serve_folder(load: Callable[[Path], Predictor] = ServingEngine) -> Bridge:
    """What the worker loads: the folder is named in the environment."""
    app = app_of(os.environ[FOLDER], load)
    return Bridge(app, longest_body=MAX_BODY_BYTES, fast_path=app.extensions[FAST_PATH])


if __name__ == "__main__":
    os.environ[FOLDER] = sys.argv[1]
    listen("deploy.server.testing:serve_folder", "127.0.0.1", int(sys.argv[2]), factory=True)
