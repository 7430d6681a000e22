"""A server whose model is slow where its file is called `slow.onnx`.

`deploy.server.__main__.listen` serves `tests.slow_app:serve_folder`.
"""

import time
from pathlib import Path

import numpy as np

from deploy.server import testing
from deploy.server.bridge import Bridge
from ml.serving.engine import Predictor, ServingEngine


class Slow:
    """Takes a quarter of a second longer for each request."""

    def __init__(self, engine: Predictor) -> None:
        self._engine = engine

    def predict(self, images: np.ndarray, *, alone: bool = True) -> np.ndarray:
        time.sleep(0.25)
        return self._engine.predict(images, alone=alone)


def load(path: Path) -> Predictor:
    engine = ServingEngine(path, cores=1)
    return Slow(engine) if path.name == "slow.onnx" else engine


def serve_folder() -> Bridge:
    return testing.serve_folder(load)
