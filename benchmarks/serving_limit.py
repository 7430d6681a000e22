"""The limit of the serving benchmark: a bare ONNX Runtime session in a loop, on arrays that are decoded already.

A process of its own that waits between measurements: `python -m benchmarks.serving_limit MODEL IMAGES` reads a job as a
line of JSON on stdin, `{"batch": n, "seconds": s}`, and answers with a line of JSON on stdout.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ml.serving.engine import SERVER_THREADS


def measure(session: ort.InferenceSession, images: np.ndarray, batch: int, seconds: float) -> dict[str, float]:
    """Runs batches one after the other.

    Args:
        session: one input, one output.
        images: float32 (n, 32, 32, 3), n >= batch.
        batch: images of one run.
        seconds: for how long at least.

    Returns:
        `per_second`, images; `p50_ms` and `p99_ms` of one run.
    """
    name = session.get_inputs()[0].name
    batches = [images[start : start + batch] for start in range(0, len(images) - batch + 1, batch)]
    for feed in batches[:3]:
        session.run(None, {name: feed})
    times = []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        session.run(None, {name: batches[len(times) % len(batches)]})
        times.append(time.perf_counter() - now)
    elapsed = time.perf_counter() - began
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
    return {"per_second": len(times) * batch / elapsed, "p50_ms": float(p50), "p99_ms": float(p99)}


def _main(model: Path, images: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    options = ort.SessionOptions()
    options.intra_op_num_threads = SERVER_THREADS
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    decoded = np.load(images).astype(np.float32)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(measure(session, decoded, job["batch"], job["seconds"])), file=answers, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
