"""Callers that ask a server without a pause, and keep what it said."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import numpy as np
from PIL import Image


@dataclass
class Tally:
    """`replies` are (version, class id, probability); `first` is when a version answered first (`time.monotonic`)."""

    replies: list[tuple[int, int, float]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def body() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def hammer(url: str, tally: Tally, ending: threading.Event) -> None:
    image = body()
    with httpx.Client(base_url=url, timeout=20) as client:
        while not ending.is_set():
            try:
                reply = client.post("/v1/predict", content=image, headers={"Content-Type": "image/png"})
            except httpx.TransportError as error:
                tally.failures.append(repr(error))
                continue
            if reply.status_code != 200:
                tally.failures.append(reply.text)
                continue
            (prediction,) = reply.json()["predictions"]
            version = reply.json()["model"]["version"]
            tally.first.setdefault(version, time.monotonic())
            tally.replies.append((version, prediction["class_id"], prediction["probability"]))


@contextmanager
def hammered(url: str, callers: int) -> Iterator[Tally]:
    """So many callers for the length of the block."""
    tally, ending = Tally(), threading.Event()
    threads = [threading.Thread(target=hammer, args=(url, tally, ending)) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        ending.set()
        for thread in threads:
            thread.join()
