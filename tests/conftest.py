"""Fixtures shared by all tiers: real PostgreSQL, real MLflow, settings under a temporary folder."""

import os

# Before NumPy is imported, and for every process that a test starts: on small matrices OpenBLAS's threads do little but
# wait for each other in a loop, which took ten times the CPU beside the other groups of tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import hypothesis
import pytest

from ml.settings import Settings

# How long an example takes is the machine's affair: speed is measured in benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# MLflow's client looks twelve times a request for platforms that it might run on, all in all half a millisecond. None
# of them is installed: this says so once.
sys.modules.update(dict.fromkeys(("dbruntime", "IPython", "pyspark")))

PASSWORD = secrets.token_urlsafe(12)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: "subprocess.Popen[bytes]", how: int = signal.SIGTERM, patience: float = 10) -> None:
    """Stops a process group that a fixture started; kills what does not end by itself."""
    if process.poll() is None:
        os.killpg(process.pid, how)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(patience)


def wait_until(ready: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not ready after {seconds:.0f} s")
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether whoever listens there says that all is well."""
    try:
        return _probe().get(url, timeout=2).is_success
    except httpx.TransportError:
        return False


@functools.cache
def _probe() -> httpx.Client:
    # One for all that is waited for: each client reads the trust store, 25 ms, and some servers take seconds to start.
    return httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


class PostgresProcess:
    """A PostgreSQL server of the tests' own, which can be stopped and started to play an outage."""

    def __init__(self, data_dir: Path) -> None:
        from ml.stack.postgres import Cluster

        self.cluster = Cluster(data_dir, free_port(), PASSWORD)
        self.cluster.create()
        self.start()

    def start(self) -> None:
        from ml.database import connect
        from ml.errors import DatabaseUnavailable

        self.process = subprocess.Popen(
            self.cluster.command(),
            user=self.cluster.system_user(),
            process_group=0,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def accepts() -> bool:
            try:
                connect(self.cluster.url("postgres")).close()
            except DatabaseUnavailable:
                return False
            return True

        wait_until(accepts, seconds=20, what="PostgreSQL")

    def stop(self) -> None:
        stop(self.process, signal.SIGINT)

    def new_database(self, name: str) -> str:
        from ml.stack.postgres import ensure_database

        return ensure_database(self.cluster, name, PASSWORD)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresProcess]:
    # Not under pytest's own folder: whenever another session starts, pytest closes that to other users, and PostgreSQL
    # is another user where the tests run as root (it then panics at its next checkpoint).
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        Path(folder).chmod(0o755)
        server = PostgresProcess(Path(folder) / "data")
        yield server
        server.stop()


@pytest.fixture
def database_url(postgres: PostgresProcess) -> str:
    """A fresh, migrated predictions database."""
    from ml.stack.migrations import migrate

    url = postgres.new_database(f"predictions_{secrets.token_hex(4)}")
    migrate(url)
    return url


@contextmanager
def mlflow_server(database_url: str, artifacts: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A real MLflow server, which serves its artifacts; gives its address."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--backend-store-uri", database_url),
                *("--serve-artifacts", "--artifacts-destination", artifacts),
            ],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment,
            process_group=0,
            stdout=output,
            stderr=output,
        )
    uri = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"MLflow ended: {log.read_text()}")
        return answers(f"{uri}/health")

    try:
        wait_until(healthy, seconds=120, what="MLflow")
        yield uri
    finally:
        stop(process)


@pytest.fixture(scope="session")
def mlflow_uri(postgres: PostgresProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow on PostgreSQL and a local folder."""
    folder = tmp_path_factory.mktemp("mlflow")
    database = postgres.new_database("mlflow")
    with mlflow_server(database, str(folder / "artifacts"), folder / "server.log", {}) as uri:
        yield uri


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings that touch nothing outside the test's folder. Tests of a service add its address with `model_copy`."""
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        mlops_var_dir=tmp_path / "var",
        cifar10_source="synthetic",
        vgg16_weights="random",
        mlops_data_url=(tmp_path / "var" / "data").as_uri(),
        mlflow_tracking_uri="http://127.0.0.1:9",  # nobody answers there
    )
