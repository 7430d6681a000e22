"""The limit of the serving benchmark: bare ONNX Runtime in a loop, on arrays that are decoded already.

A process of its own that waits between measurements: `python -m benchmarks.serving_limit MODEL IMAGES` reads a job as a
line of JSON on stdin, `{"loops": l, "batch": n, "seconds": s}`, and answers with a line of JSON on stdout. One loop has
a session that uses all threads; several share them, with a session each.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

THREADS = 2
"""Of a session that has all; BentoML's has as many."""


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


def measure_together(
    sessions: Sequence[ort.InferenceSession], images: np.ndarray, batch: int, seconds: float
) -> dict[str, float]:
    """As `measure`, of as many loops at once as there are sessions; rates add up, times are the slowest loop's."""
    with ThreadPoolExecutor(len(sessions)) as pool:
        found = list(pool.map(lambda session: measure(session, images, batch, seconds), sessions))
    slowest = {key: max(each[key] for each in found) for key in ("p50_ms", "p99_ms")}
    return {"per_second": sum(each["per_second"] for each in found), **slowest}


def _session(model: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _main(model: Path, images: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    sessions = {1: [_session(model, THREADS)], THREADS: [_session(model, 1) for _ in range(THREADS)]}
    decoded = np.load(images).astype(np.float32)
    for line in sys.stdin:
        job = json.loads(line)
        found = measure_together(sessions[job["loops"]], decoded, job["batch"], job["seconds"])
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
