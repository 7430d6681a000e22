"""The prediction server as a process of its own: as it is deployed, or on a folder in the registry's place."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.server.testing import FOLDER
from ml.settings import PROJECT_ROOT
from tests.conftest import answers, free_port, stop, wait_until

FOLDER_SERVER = "deploy.server.testing:serve_folder"


@contextmanager
def serving_folder(
    folder: Path, log: Path, target: str = FOLDER_SERVER
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Serves it, ready; the process that supervises, and the address."""
    port = free_port()
    script = f"from deploy.server.__main__ import listen; listen({target!r}, '127.0.0.1', {port}, factory=True)"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, FOLDER: str(folder)},
            process_group=0,
            stdout=stream,
            stderr=stream,
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        return answers(f"{url}/readyz")

    try:
        wait_until(ready, seconds=60, what=f"the server ({log})")
        yield process, url
    finally:
        stop(process)


NOBODY = "http://127.0.0.1:9"
"""Where no registry answers."""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "MLOPS_VAR_DIR": str(tmp_path / "var"), "MLFLOW_TRACKING_URI": NOBODY, **more}


def command() -> list[str]:
    return [sys.executable, "-m", "deploy.server"]


def remember_champion(tmp_path: Path, model: Path, version: int) -> None:
    """Makes it a machine that has served this champion before."""
    memory = tmp_path / "var" / "cache" / "serving" / "last_champion.json"
    memory.parent.mkdir(parents=True)
    record = {"name": "cifar10-classifier", "version": version, "data": "SYNTHETIC", "path": str(model)}
    memory.write_text(json.dumps(record))


@contextmanager
def serving(
    tmp_path: Path, database_url: str, argv: Sequence[str] = (), **more: str
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A server as it is deployed, ready: its supervisor, address and log file. `argv`: how, where not by `command`."""
    port = free_port()
    log = tmp_path / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*(argv or command())],
            cwd=PROJECT_ROOT,
            env=environment(tmp_path, API_PORT=str(port), MLOPS_DATABASE_URL=database_url, **more),
            process_group=0,
            stdout=stream,
            stderr=stream,
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return answers(f"{url}/readyz")

    try:
        wait_until(ready, seconds=90, what="the server")
        yield process, url, log
    finally:
        stop(process)
