"""A real gunicorn, hammered while its champion changes: no failed request, and no reply of two models at once."""

import io
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest
from PIL import Image

from ml.serving.testing import FolderSource
from tests.conftest import free_port, stop, wait_until
from tests.tiny_models import always, make_onnx

CLASS_OF = {1: 2, 2: 5, 3: 7, 4: 0, 5: 9}
"""What each version answers to every image."""


@dataclass
class Tally:
    replies: list[tuple[int, int, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "registry"
    folder.mkdir()
    for version, class_id in CLASS_OF.items():
        make_onnx(tmp_path / f"{version}.onnx", **always(class_id, confidence=0.5 + version / 20))
    FolderSource(folder).crown(tmp_path / "1.onnx", 1)
    port = free_port()
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "8"),
                *("--no-control-socket", "--bind", f"127.0.0.1:{port}", f'deploy.server.testing:app_of("{folder}")'),
            ],
            process_group=0,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"

    def ready():
        try:
            return httpx.get(f"{url}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, seconds=60, what=f"gunicorn ({tmp_path / 'server.log'})")
        yield process, url
    finally:
        stop(process)


def body():
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def hammer(url, tally, ending):
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
            tally.replies.append((reply.json()["model"]["version"], prediction["class_id"], prediction["probability"]))


def test_champions_change_under_load_without_a_failed_request(server, tmp_path):
    _, url = server
    source = FolderSource(tmp_path / "registry")
    tally, ending = Tally(), threading.Event()
    threads = [threading.Thread(target=hammer, args=(url, tally, ending)) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for version in (2, 3, 4, 5, 1):
            seen = len(tally.replies)
            wait_until(lambda seen=seen: len(tally.replies) > seen + 30, seconds=30, what="traffic")
            source.crown(tmp_path / f"{version}.onnx", version)
            wait_until(
                lambda version=version: httpx.get(f"{url}/v1/model").json()["version"] == version,
                seconds=30,
                what=f"version {version}",
            )
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert tally.failures == []
    assert {version for version, _, _ in tally.replies} == set(CLASS_OF)
    for version, class_id, probability in tally.replies:
        assert class_id == CLASS_OF[version]
        assert probability == pytest.approx(0.5 + version / 20, abs=1e-3)
    state = httpx.get(f"{url}/v1/model").json()
    assert (state["swaps"], state["failed_swaps"]) == (6, 0)


def test_a_broken_champion_under_load_changes_nothing(server, tmp_path):
    _, url = server
    tally, ending = Tally(), threading.Event()
    thread = threading.Thread(target=hammer, args=(url, tally, ending))
    thread.start()
    try:
        wait_until(lambda: len(tally.replies) > 20, seconds=30, what="traffic")
        (tmp_path / "6.onnx").write_bytes(b"broken")
        FolderSource(tmp_path / "registry").crown(tmp_path / "6.onnx", 6)
        wait_until(lambda: httpx.get(f"{url}/v1/model").json()["failed_swaps"] == 1, seconds=30, what="the failed swap")
        answered = len(tally.replies)
        wait_until(lambda: len(tally.replies) > answered + 20, seconds=30, what="traffic after it")
    finally:
        ending.set()
        thread.join()
    assert tally.failures == []
    assert {version for version, _, _ in tally.replies} == {1}


def test_a_server_told_to_end_answers_what_it_has_begun(server):
    process, url = server
    tally, ending = Tally(), threading.Event()
    thread = threading.Thread(target=hammer, args=(url, tally, ending))
    thread.start()
    wait_until(lambda: len(tally.replies) > 20, seconds=30, what="traffic")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    ending.set()
    thread.join()
    # A new connection is refused once it is gone; what is not allowed is a reply cut short or an error page.
    assert all("Connect" in failure or "disconnected" in failure for failure in tally.failures)
