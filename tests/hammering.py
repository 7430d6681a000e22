"""Callers that ask a server again and again, and keep what it said; what of it is in the log."""

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import httpx
import numpy as np
from PIL import Image

from ml.database import transaction


@dataclass
class Tally:
    """`replies` are (version, class id, probability); `first` is when a version answered first (`time.monotonic`).

    Every request has an id of its own: `answered` are those of replies, `cut_off` of connections that broke, `refused`
    of replies that are none. `seconds` are those that the replies took.
    """

    replies: list[tuple[int, int, float]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    @property
    def sent(self) -> set[str]:
        return self.answered | self.cut_off | self.refused


def body() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def hammer(url: str, tally: Tally, ending: threading.Event, pause: float = 0.0) -> None:
    image = body()
    with httpx.Client(base_url=url, timeout=20) as client:
        while not ending.is_set():
            request_id, began = str(uuid4()), time.monotonic()
            headers = {"Content-Type": "image/png", "X-Request-ID": request_id}
            try:
                reply = client.post("/v1/predict", content=image, headers=headers)
            except httpx.TransportError as error:
                tally.cut_off.add(request_id)
                tally.failures.append(repr(error))
                continue
            if reply.status_code != 200:
                tally.refused.add(request_id)
                tally.failures.append(reply.text)
                continue
            assert reply.headers["X-Request-ID"] == request_id
            tally.seconds.append(time.monotonic() - began)
            tally.answered.add(request_id)
            (prediction,) = reply.json()["predictions"]
            version = reply.json()["model"]["version"]
            tally.first.setdefault(version, time.monotonic())
            tally.replies.append((version, prediction["class_id"], prediction["probability"]))
            ending.wait(pause)


@contextmanager
def hammered(url: str, callers: int, pause: float = 0.0) -> Iterator[Tally]:
    """So many callers for the length of the block, each of which waits for `pause` seconds after a reply."""
    tally, ending = Tally(), threading.Event()
    threads = [threading.Thread(target=hammer, args=(url, tally, ending, pause)) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def logged(database_url: str) -> Counter[str]:
    """How many images of each request are in the log. A request is there as a whole, or not at all."""
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT r.request_id::text, r.images, count(p.id) FROM requests r "
            "LEFT JOIN predictions p USING (request_id) GROUP BY r.request_id, r.images"
        )
        rows = cursor.fetchall()
    assert [row for row in rows if row[1] != row[2]] == []
    return Counter({request_id: images for request_id, images, _ in rows})
