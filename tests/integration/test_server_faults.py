"""Faults that the deployed server must survive, under load: what was sent, answered and logged must add up.

Each test prints these three numbers, and keeps them as properties of its report.
"""

import base64
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest

from ml.client import CifarClient
from ml.database import transaction
from ml.serving.testing import FolderSource
from ml.settings import PROJECT_ROOT
from ml.stack.migrations import migrate
from tests.conftest import PostgresProcess, stop, wait_until
from tests.faulty_app import BODY_SECONDS, JUMPS
from tests.hammering import body, hammered, logged
from tests.server_process import remember_champion, serving
from tests.tiny_models import always, make_onnx

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "10"))
"""More for a long soak: `SOAK_SECONDS=1800 pytest --timeout=3600 -k flat ...`."""


@pytest.fixture(scope="module")
def database():
    """PostgreSQL of this module's own, since it is killed."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        Path(folder).chmod(0o755)
        server = PostgresProcess(Path(folder) / "data")
        yield server
        server.stop()


def new_database(database, name):
    url = database.new_database(name)
    migrate(url)
    return url


def on_folder(folder):
    """Variables that put a folder in the registry's place."""
    return {
        "PYTHONPATH": f"{PROJECT_ROOT / 'benchmarks' / 'folder_registry'}:{PROJECT_ROOT}",
        "BENCH_FOLDER": str(folder),
    }


class Server:
    """A deployed server, its registry and its log."""

    def __init__(self, process, url, folder, database_url):
        self.process, self.url, self.folder, self.database_url = process, url, folder, database_url
        self.registry = FolderSource(folder)

    def model(self):
        return httpx.get(f"{self.url}/v1/model").json()

    def figure(self, name):
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"cifar10_{name} "))

    def worker(self):
        """The process id of the supervisor's one child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def log_is_written(self, seconds=30):
        wait_until(
            lambda: self.figure("prediction_log_queued_rows") == self.figure("prediction_log_spool_bytes") == 0,
            seconds=seconds,
            what="the log",
        )


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    """Started while the registry is away, on a machine that has served a champion before."""
    tmp_path = tmp_path_factory.mktemp("faults")
    remember_champion(tmp_path, make_onnx(tmp_path / "1.onnx", **always(1)), 1)
    folder, url = tmp_path / "registry", new_database(database, "faults")
    with serving(tmp_path, url, **on_folder(folder)) as (process, address, _):
        yield Server(process, address, folder, url)


@pytest.fixture
def tell(record_property, request):
    def told(**numbers):
        for name, number in numbers.items():
            record_property(name, number)
        print(f"\n{request.node.name}: {', '.join(f'{name} {number}' for name, number in numbers.items())}")

    return told


def answers(tally, more=30):
    """Waits for so many replies from now on."""
    seen = len(tally.replies)
    wait_until(lambda: len(tally.replies) >= seen + more, seconds=30, what="traffic")


def check_all_answered_and_logged(server, tally, tell, **more):
    assert tally.failures == []
    server.log_is_written()
    found = logged(server.database_url).keys() & tally.sent
    tell(sent=len(tally.sent), answered=len(tally.answered), logged=len(found), **more)
    assert len(tally.replies) == len(tally.sent)
    assert found == tally.sent


def test_a_registry_that_is_away_is_told_and_costs_nobody_an_answer(server, tell):
    model = server.model()
    assert (model["version"], model["failure"]["message"]) == (1, "The model registry could not be asked.")
    assert server.figure("model_failing") == 1
    with hammered(server.url, callers=4, pause=0.01) as tally:
        answers(tally)
        server.folder.mkdir()
        server.registry.crown(make_onnx(server.folder.parent / "2.onnx", **always(2)), 2)
        wait_until(lambda: server.model()["version"] == 2, seconds=30, what="the registry's champion")
        assert (server.model()["failure"], server.figure("model_failing")) == (None, 0)
        away = server.folder.rename(server.folder.with_name("away"))
        wait_until(lambda: server.model()["failure"], seconds=30, what="the report")
        assert server.figure("model_failing") == 1
        answers(tally)
        away.rename(server.folder)
        wait_until(lambda: server.model()["failure"] is None, seconds=30, what="the registry")
        answers(tally)
    assert server.figure("model_swap_failures_total") == 0
    assert {version for version, _, _ in tally.replies} == {1, 2}
    check_all_answered_and_logged(server, tally, tell)


def test_corrupt_versions_that_are_promoted_are_told_and_never_serve(server, tell):
    good = make_onnx(server.folder.parent / "good.onnx", **always(2))
    serves = server.model()["version"]
    broken = {
        101: b"no model at all",
        102: good.read_bytes()[: good.stat().st_size // 2],
        103: make_onnx(good.with_name("nan.onnx"), bias=np.full(10, np.nan)).read_bytes(),
    }
    with hammered(server.url, callers=4, pause=0.01) as tally:
        before = server.figure("model_swap_failures_total")
        for failures, (version, content) in enumerate(broken.items(), start=1):
            path = good.with_name(f"{version}.onnx")
            path.write_bytes(content)
            server.registry.crown(path, version)
            wait_until(
                lambda version=version: (server.model()["failure"] or {}).get("version") == version,
                seconds=30,
                what=f"the report of {version}",
            )
            assert server.figure("model_swap_failures_total") == before + failures
            assert server.model()["version"] == serves
            answers(tally)
        server.registry.crown(good, 104)
        wait_until(lambda: server.model()["version"] == 104, seconds=30, what="the good one")
        answers(tally)
    assert server.model()["failure"] is None
    assert {version for version, _, _ in tally.replies} == {serves, 104}
    check_all_answered_and_logged(server, tally, tell)


def test_postgresql_killed_and_back_is_not_felt(server, database, tell):
    with hammered(server.url, callers=8, pause=0.01) as tally:
        answers(tally, 100)
        stop(database.process, signal.SIGKILL)
        before, gone = len(tally.replies), time.monotonic()
        wait_until(lambda: server.figure("prediction_log_database_up") == 0, seconds=10, what="the report")
        time.sleep(max(0.0, gone + 2 - time.monotonic()))
        meanwhile = len(tally.replies) - before
        database.start()
        answers(tally, 100)
    assert meanwhile > 100
    assert max(tally.seconds) < 2
    check_all_answered_and_logged(server, tally, tell, slowest_ms=round(max(tally.seconds) * 1000))


def test_a_worker_killed_under_load_loses_no_answer(server, tell):
    first, died, said, errors = server.worker(), 0.0, [], []
    ending = threading.Event()

    def call():
        with CifarClient(server.url, patience=20) as client:
            while not ending.is_set():
                try:
                    said.extend(client.predict(np.zeros((2, 32, 32, 3), np.uint8)))
                except Exception as error:  # noqa: BLE001 - each is a failure of the test
                    errors.append(repr(error))
                ending.wait(0.02)

    clients = [threading.Thread(target=call) for _ in range(2)]
    with hammered(server.url, callers=8) as tally:
        for client in clients:
            client.start()
        answers(tally, 100)
        os.kill(first, signal.SIGKILL)
        died = time.monotonic()
        wait_until(lambda: not Path(f"/proc/{first}").exists(), seconds=10, what="the end of the worker")
        answers(tally, 1)
        back = time.monotonic() - died
        answers(tally, 200)
        ending.set()
        for client in clients:
            client.join()
    assert server.worker() != first
    assert back < 10
    assert errors == []
    # No more than one request of each caller was under way; who came meanwhile waited.
    assert tally.refused == set()
    assert 0 < len(tally.cut_off) <= 8
    server.log_is_written()
    found = logged(server.database_url)
    assert tally.answered <= found.keys()
    assert {one.request_id for one in said} <= found.keys()
    assert {found[one.request_id] for one in said} == {2}
    unanswered = len(tally.cut_off & found.keys())
    for request_id in tally.cut_off:  # as a client would: the same id again
        headers = {"Content-Type": "image/png", "X-Request-ID": request_id}
        assert httpx.post(f"{server.url}/v1/predict", content=body(), headers=headers).status_code == 200
    server.log_is_written()
    again = logged(server.database_url)
    assert tally.sent <= again.keys()
    assert {again[request_id] for request_id in tally.sent} == {1}
    tell(
        sent=len(tally.sent),
        answered=len(tally.answered),
        cut_off=len(tally.cut_off),
        logged=len(tally.sent & found.keys()),
        logged_of_the_cut_off=unanswered,
        logged_once_repeated=len(tally.sent & again.keys()),
        clients_images=len(said),
        seconds_away=round(back, 2),
    )


def resident(pid):
    """Bytes of its own memory, files aside."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_memory_stays_flat_under_load(server, tell):
    """A request that left behind its image, or its row of the log (3 KB each), would be seen."""
    with hammered(server.url, callers=6, pause=0.015) as tally:
        answers(tally, 800)
        first, begun = resident(server.worker()), len(tally.replies)
        until = time.monotonic() + SOAK_SECONDS
        wait_until(lambda: time.monotonic() > until, seconds=2 * SOAK_SECONDS, what="the clock")
        grown, asked = resident(server.worker()) - first, len(tally.replies) - begun
    assert asked > 1000
    assert grown < 1500 * asked
    check_all_answered_and_logged(server, tally, tell, requests_measured=asked, grown_kb=grown >> 10)


def listening(program):
    """A command that serves after `program`."""
    return [sys.executable, "-c", program]


def test_a_full_disk_costs_no_answer_and_what_is_dropped_is_counted(database, tmp_path, tell):
    """No file grows beyond 300 KB, and PostgreSQL takes nothing: first the memory holds the rows, then nothing does."""
    url = new_database(database, "full")
    remember_champion(tmp_path, make_onnx(tmp_path / "1.onnx", **always(1)), 1)
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    program += "from deploy.server.__main__ import main; main()"
    payload = {"images": [base64.b64encode(body()).decode()] * 64}
    images, answered = {}, 0
    with serving(tmp_path, url, listening(program)) as (process, address, _), httpx.Client(base_url=address) as client:
        server = Server(process, address, tmp_path / "none", url)

        def send(count):
            nonlocal answered
            for _ in range(count):
                request_id = str(uuid4())
                images[request_id] = 64
                reply = client.post("/v1/predict", json=payload, headers={"X-Request-ID": request_id})
                answered += reply.status_code == 200

        send(5)  # the disk is full, and PostgreSQL takes what the memory holds
        server.log_is_written()
        assert sum(logged(url).values()) == 5 * 64
        database.stop()
        send(170)
        assert server.figure("prediction_log_spool_up") == 0
        dropped = server.figure("prediction_log_dropped_rows_total")
        database.start()
        wait_until(lambda: server.figure("prediction_log_queued_rows") == 0, seconds=30, what="the log")
    found = logged(url)
    written = sum(found.values())
    tell(sent=175, answered=answered, images=175 * 64, images_logged=written, images_dropped=int(dropped))
    assert answered == 175
    assert 0 < dropped < 60 * 64
    assert written + dropped == 175 * 64
    assert found.keys() <= images.keys()


@contextmanager
def sockets(address, count, opening):
    """Connections that have said this so far."""
    made = [socket.create_connection(address) for _ in range(count)]
    try:
        for connection in made:
            connection.sendall(opening)
        yield made
    finally:
        for connection in made:
            connection.close()


def trickle(connections, ending):
    """Sends a byte of each every so often, until they are closed."""
    while not ending.wait(0.4):
        for connection in connections:
            try:
                connection.send(b"x")
            except OSError:
                continue


def deaf(address):
    """A connection that asks for more than fits between the two, and reads nothing of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.sendall(b"GET /static/page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 1000)
    return connection


def read_all(connection):
    """What the server said before it closed the connection; TimeoutError where it does not."""
    connection.settimeout(15)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_slow_clients_and_a_jumping_clock_cost_nobody_an_answer(database, tmp_path, tell):
    url = new_database(database, "slow")
    remember_champion(tmp_path, make_onnx(tmp_path / "1.onnx", **always(1)), 1)
    program = (
        "import os, deploy.server.__main__ as server; server.UNREAD_SECONDS = 1; "
        "server.listen('tests.faulty_app:serve', '127.0.0.1', int(os.environ['API_PORT']), factory=True, "
        f"header_seconds={BODY_SECONDS})"
    )
    head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n"
    with serving(tmp_path, url, listening(program)) as (process, address, _):
        server = Server(process, address, tmp_path / "none", url)
        place = ("127.0.0.1", httpx.URL(address).port)
        ending = threading.Event()
        with hammered(address, callers=4, pause=0.02) as tally:
            answers(tally, 200)
            normal = statistics.median(tally.seconds)
            unread = [deaf(place) for _ in range(3)]
            before = len(tally.seconds)
            with (
                sockets(place, 300, head) as headers,
                sockets(place, 300, head + b"\r\n") as bodies,
                sockets(place, 300, b"") as silent,
            ):
                began = time.monotonic()
                slow = threading.Thread(target=trickle, args=([*headers, *bodies], ending))
                slow.start()
                replies = [read_all(connection) for connection in bodies]
                assert {read_all(connection) for connection in [*headers, *silent]} == {b""}
                took = time.monotonic() - began
                ending.set()
                slow.join()
                meanwhile = statistics.median(tally.seconds[before:])
                asked = len(tally.seconds) - before
            answers(tally)
        statuses = {reply.split(b" ", 2)[1] for reply in replies}
        assert statuses == {b"408"}
        assert all(b"application/problem+json" in reply for reply in replies)
        assert server.figure('http_requests_total{method="",route="none",status="408"}') == 300
        for connection in unread:
            with connection, pytest.raises(ConnectionResetError):
                read_all(connection)
        assert took < BODY_SECONDS + 4
        assert asked > 20
        assert meanwhile < 5 * normal + 0.05
        check_all_answered_and_logged(
            server,
            tally,
            tell,
            slow=903,
            median_ms=round(normal * 1000, 1),
            median_meanwhile_ms=round(meanwhile * 1000, 1),
            seconds_until_closed=round(took, 1),
        )
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT created_at::date, count(*) FROM predictions GROUP BY 1")
        days = dict(cursor.fetchall())
    today = datetime.now(UTC)
    assert len(days) >= len(JUMPS)
    assert {round((day - today.date()).days / 3650) for day in days} == {-1, 0, 1}
    assert sum(days.values()) == len(tally.sent)
