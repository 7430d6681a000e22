"""A real server process, hammered while its champion changes: no failed request, and no reply of two models at once."""

import signal
import threading

import httpx
import numpy as np
import pytest

from ml.serving.testing import FolderSource
from tests.conftest import wait_until
from tests.hammering import Tally, hammer, hammered
from tests.server_process import FOLDER_SERVER, serving_folder
from tests.tiny_models import PIXELS, always, make_onnx

CLASS_OF = {1: 2, 2: 5, 3: 7, 4: 0, 5: 9}
"""What each version answers to every image."""
SWAPS = [(2, "fp32"), (3, "int8"), (3, "fp32"), (4, "fp32"), (4, "int8"), (5, "int8"), (1, "fp32"), (5, "fp32"),
         (2, "int8"), (1, "int8")]  # fmt: skip
"""Versions and the forms in which they serve, one after the other."""


@pytest.fixture
def target():
    return FOLDER_SERVER


@pytest.fixture
def server(tmp_path, target):
    folder = tmp_path / "registry"
    folder.mkdir()
    for version, class_id in CLASS_OF.items():
        make_onnx(tmp_path / f"{version}.onnx", **always(class_id, confidence=0.5 + version / 20))
    FolderSource(folder).crown(tmp_path / "1.onnx", 1)
    with serving_folder(folder, tmp_path / "server.log", target) as running:
        yield running


def serves(url):
    state = httpx.get(f"{url}/v1/model").json()
    return state["version"], state["engine"]


def test_champions_change_under_load_without_a_failed_request(server, tmp_path):
    _, url = server
    source = FolderSource(tmp_path / "registry")
    for version, class_id in CLASS_OF.items():
        other = tmp_path / f"{version}.int8.onnx"
        make_onnx(other, **always(class_id, confidence=0.5 + version / 20), padding_bytes=8)
    with hammered(url, callers=16) as tally:
        for version, engine in SWAPS:
            seen = len(tally.replies)
            wait_until(lambda seen=seen: len(tally.replies) > seen + 30, seconds=30, what="traffic")
            form = ".int8" if engine == "int8" else ""
            source.crown(tmp_path / f"{version}{form}.onnx", version, engine=engine)
            wait_until(
                lambda wanted=(version, engine): serves(url) == wanted,
                seconds=30,
                what=f"version {version} as {engine}",
            )
    assert tally.failures == []
    assert {version for version, _, _ in tally.replies} == set(CLASS_OF)
    for version, class_id, probability in tally.replies:
        assert class_id == CLASS_OF[version]
        assert probability == pytest.approx(0.5 + version / 20, abs=1e-3)
    state = httpx.get(f"{url}/v1/model").json()
    assert (state["swaps"], state["failed_swaps"]) == (1 + len(SWAPS), 0)
    assert len(tally.answered) == len(tally.sent) == len(tally.replies)


def test_a_broken_champion_under_load_changes_nothing(server, tmp_path):
    _, url = server
    with hammered(url, callers=1) as tally:
        wait_until(lambda: len(tally.replies) > 20, seconds=30, what="traffic")
        (tmp_path / "6.onnx").write_bytes(b"broken")
        FolderSource(tmp_path / "registry").crown(tmp_path / "6.onnx", 6)
        wait_until(lambda: httpx.get(f"{url}/v1/model").json()["failed_swaps"] == 1, seconds=30, what="the failed swap")
        answered = len(tally.replies)
        wait_until(lambda: len(tally.replies) > answered + 20, seconds=30, what="traffic after it")
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


@pytest.mark.parametrize("target", ["tests.slow_app:serve_folder"])
def test_a_challenger_under_load_costs_nobody_an_answer(server, tmp_path):
    """One that fails on every image, one that is slower than the traffic, then a good one as a canary."""
    _, url = server
    source = FolderSource(tmp_path / "registry")

    def seen(what):
        return (httpx.get(f"{url}/v1/model").json()["challenger"] or {}).get(what, 0)

    with hammered(url, callers=6) as tally:
        # Its warm-up, a blank image, goes well; anything brighter overflows.
        source.name_challenger(make_onnx(tmp_path / "broken.onnx", weights=np.full((PIXELS, 10), 3e38)), 8)
        source.send(8, "mirror", 1)
        wait_until(lambda: seen("failed") > 100, seconds=30, what="failures")
        source.name_challenger(make_onnx(tmp_path / "slow.onnx", **always(8)), 9)
        source.send(9, "mirror", 1)
        wait_until(lambda: seen("dropped") > 100 and seen("mirrored") > 1, seconds=60, what="a full queue")
        assert {version for version, _, _ in tally.replies} == {1}
        source.name_challenger(tmp_path / "2.onnx", 2)
        source.send(2, "canary", 0.5)
        wait_until(lambda: seen("answered") > 50, seconds=30, what="answers of the canary")
        source.end_traffic()
        wait_until(lambda: seen("version") == 0, seconds=30, what="the end of the traffic")
        answered = len(tally.replies)
        wait_until(lambda: len(tally.replies) > answered + 50, seconds=30, what="traffic after it")
    assert tally.failures == []
    assert {version for version, _, _ in tally.replies} == {1, 2}
    assert {version for version, _, _ in tally.replies[-30:]} == {1}
    assert all(class_id == CLASS_OF[version] for version, class_id, _ in tally.replies)
    assert httpx.get(f"{url}/v1/model").json()["failed_swaps"] == 0
