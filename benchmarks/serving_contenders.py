"""The servers of the serving benchmark: how each is started, what it is sent, what it answers, what it costs.

All are real processes on loopback, and all serve the same VGG16 (`benchmarks.serving_models`).
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.load import post
from benchmarks.serving_limit import THREADS
from ml.database import connect
from ml.errors import DatabaseUnavailable
from ml.settings import PROJECT_ROOT, Settings, load_settings
from ml.stack import components
from ml.stack.migrations import migrate
from ml.stack.postgres import Cluster, ensure_database
from ml.stack.secret_store import load_or_create
from ml.stack.supervisor import Service, tail

BENTOML = PROJECT_ROOT / ".venv-bench" / "bin" / "bentoml"
HOST = "127.0.0.1"
FOLDER_REGISTRY = PROJECT_ROOT / "benchmarks" / "folder_registry"
_PATIENCE = 180.0
_BOUNDARY = "an-image-follows"


@dataclass(frozen=True)
class Contender:
    """A server that could be started.

    `request` makes the whole HTTP request for one image, uint8 (32, 32, 3); `probabilities` reads the ten out of the
    answer's JSON.
    """

    name: str
    precision: str
    port: int
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: str
    request: Callable[[np.ndarray], bytes]
    probabilities: Callable[[Any], Sequence[float]]
    folder: Path = PROJECT_ROOT

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"


class Server:
    """A contender that runs, in a process group of its own.

    Raises:
        RuntimeError: it ended, or was not ready in time; with its last words.
    """

    def __init__(self, contender: Contender, log: Path) -> None:
        self.contender = contender
        self._log = log
        began = time.perf_counter()
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                contender.command,
                cwd=contender.folder,
                env=dict(contender.environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                process_group=0,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.perf_counter() - began
        """From the start of the process to the first 200 of its readiness."""

    def stop(self) -> None:
        """Ends it in order, and kills what does not end by itself."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def cpu_seconds(self) -> float:
        """CPU time that its processes have taken so far."""
        return sum(times.user + times.system for times in (p.cpu_times() for p in self._processes()))

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of all its processes, in MB (10^6 bytes).

        `rss` counts what they share in each of them, `pss` once.
        """
        found = [process.memory_full_info() for process in self._processes()]
        return {"rss": sum(m.rss for m in found) / 1e6, "pss": sum(m.pss for m in found) / 1e6}

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _wait(self) -> None:
        name, url = self.contender.name, self.contender.url + self.contender.ready
        deadline = time.monotonic() + _PATIENCE
        with httpx.Client(timeout=5, trust_env=False) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {self._process.returncode}:\n{tail(self._log)}")
                try:
                    if client.get(url).status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # it does not listen yet
                time.sleep(0.01)
        raise RuntimeError(f"{name} was not ready after {_PATIENCE:.0f} s:\n{tail(self._log)}")


@contextmanager
def started(contender: Contender, log: Path) -> Iterator[Server]:
    """A server for the length of the block."""
    server = Server(contender, log)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def database_server(folder: Path) -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server, as the local stack's; gives what makes a migrated database and returns its URL."""
    folder.chmod(0o755)  # as root, PostgreSQL runs under another account
    password = load_or_create(folder).postgres
    cluster = Cluster(folder / "postgres", _free_port(), password)
    cluster.create()
    process = subprocess.Popen(
        cluster.command(),
        user=cluster.system_user(),
        process_group=0,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def database(name: str) -> str:
        url = ensure_database(cluster, name, password)
        migrate(url)
        return url

    try:
        _accepts(cluster.url("postgres"))
        yield database
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)


def ours(precision: str, folder: Path, database_url: str) -> Contender:
    """The server by the local stack's own command, with its log, and `folder`/registry in the registry's place."""
    port = _free_port()
    settings = load_settings(mlops_var_dir=folder / "var", api_port=port)
    service = _deployed(settings)
    own = {
        "MLOPS_DATABASE_URL": database_url,
        "MLOPS_VAR_DIR": str(settings.mlops_var_dir),
        "API_PORT": str(port),
        "API_HOST": HOST,
        "PREDICTION_API_KEYS": "",
        "PREDICTION_RATE_LIMIT": "0",
        "BENCH_FOLDER": str(folder / "registry"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER_REGISTRY), os.environ.get("PYTHONPATH")])),
    }
    return Contender(
        name=f"ours_{precision}",
        precision=precision,
        port=port,
        command=service.command,
        environment={**service.environment, **own},
        ready="/readyz",
        request=lambda image: post(f"{HOST}:{port}", "/v1/predict", "image/png", png(image)),
        probabilities=lambda reply: list(reply["predictions"][0]["probabilities"].values()),
    )


def flask(models: Path) -> Contender:
    """Flask and `model.predict`, by gunicorn with one process and eight threads."""
    port = _free_port()
    return Contender(
        name="flask",
        precision="fp32",
        port=port,
        command=[
            *(sys.executable, "-m", "gunicorn", "--workers", "1", "--threads", "8", "--keep-alive", "30"),
            *("--timeout", "120", "--bind", f"{HOST}:{port}", "benchmarks.serving_flask:app"),
        ],
        environment=_environment(BENCH_KERAS=str(models / "keras" / "model.keras")),
        ready="/ready",
        request=lambda image: post(f"{HOST}:{port}", "/predict", "image/png", png(image)),
        probabilities=lambda reply: reply["probabilities"],
    )


def mlflow(models: Path) -> Contender:
    """`mlflow models serve` of the Keras flavour; it takes arrays alone, so it is spared the decoding."""
    port = _free_port()
    return Contender(
        name="mlflow",
        precision="fp32",
        port=port,
        command=[
            *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(models / "mlflow")),
            *("--env-manager", "local", "--host", HOST, "--port", str(port)),
        ],
        environment=_environment(),
        ready="/ping",
        request=lambda image: post(
            f"{HOST}:{port}", "/invocations", "application/json", json.dumps({"inputs": [image.tolist()]}).encode()
        ),
        probabilities=lambda reply: reply["predictions"][0],
    )


def bentoml(precision: str, models: Path, home: Path) -> Contender:
    """BentoML with adaptive batching on the ONNX file.

    Raises:
        RuntimeError: its environment is missing.
    """
    if not BENTOML.exists():
        raise RuntimeError(f"{BENTOML} is not there. Fix: run `make bench-serve`, which makes its environment.")
    port = _free_port()
    return Contender(
        name=f"bentoml_{precision}",
        precision=precision,
        port=port,
        command=[str(BENTOML), "serve", "serving_bentoml:Vgg16", "--host", HOST, "--port", str(port)],
        environment=_environment(
            BENCH_ONNX=str(models / f"{precision}.onnx"),
            BENCH_THREADS=str(THREADS),
            BENTOML_HOME=str(home),
            BENTOML_DO_NOT_TRACK="True",
        ),
        ready="/readyz",
        request=lambda image: post(
            f"{HOST}:{port}", "/predict", f"multipart/form-data; boundary={_BOUNDARY}", _form("images", png(image))
        ),
        probabilities=lambda reply: reply[0],
        folder=PROJECT_ROOT / "benchmarks",
    )


def png(image: np.ndarray) -> bytes:
    """uint8 (32, 32, 3) as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _deployed(settings: Settings) -> Service:
    units = components.units(settings, load_or_create(settings.mlops_var_dir))
    (service,) = (unit for unit in units if isinstance(unit, Service) and unit.name == "prediction-server")
    return service


def _environment(**more: str) -> dict[str, str]:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # MLflow starts its server by a name that it looks for in PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **quiet, "PATH": path, **more}


def _form(field: str, file: bytes) -> bytes:
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="image.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    return head.encode() + file + f"\r\n--{_BOUNDARY}--\r\n".encode()


def _accepts(url: str) -> None:
    """Waits until PostgreSQL lets one in."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connect(url).close()
        except DatabaseUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
