"""A server whose model is slow where its file is called `slow.onnx`.

gunicorn serves `tests.slow_app:app_of("/folder")`.
"""

import time
from pathlib import Path

import numpy as np
from flask import Flask

from deploy.server import testing
from ml.serving.engine import Engine
from ml.serving.hot_swap import Predictor


class Slow:
    """Takes a quarter of a second longer for each request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def predict(self, images: np.ndarray) -> np.ndarray:
        time.sleep(0.25)
        return self._engine.predict(images)


def load(path: Path) -> Predictor:
    engine = Engine(path, threads=1)
    return Slow(engine) if path.name == "slow.onnx" else engine


def app_of(folder: str) -> Flask:
    return testing.app_of(folder, load)
