"""BentoML's server of the serving benchmark: adaptive batching before the same ONNX file, with the same threads.

It runs in an environment of its own (requirements/bench.txt) and may import nothing of this repository. `BENCH_ONNX`
names the file. The images come as encoded files, one a request; one service decodes and predicts, which spares the hop
to a second process that the documentation's other arrangement has.
"""

import os

import bentoml
import numpy as np
import onnxruntime as ort
import PIL.Image

THREADS = int(os.environ.get("BENCH_THREADS", "2"))


@bentoml.service(
    workers=1,
    # A second batch may be prepared while one computes, and nobody is sent away for want of room.
    traffic={"timeout": 60, "max_concurrency": 256},
    logging={"access": {"enabled": False}},
)
class Vgg16:
    """One session, as the server's."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        self._session = ort.InferenceSession(os.environ["BENCH_ONNX"], options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    # It sends away what it expects to take longer than the latency, so that is far above what is measured.
    @bentoml.api(route="/predict", batchable=True, max_batch_size=32, max_latency_ms=10_000)
    def predict(self, images: list[PIL.Image.Image]) -> list[list[float]]:
        """Ten probabilities for each."""
        batch = np.stack([np.asarray(image.convert("RGB").resize((32, 32)), np.float32) for image in images])
        return self._session.run(None, {self._input: batch})[0].tolist()
