"""The prediction server as a process of its own, on a folder in the registry's place."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.server.testing import FOLDER
from tests.conftest import free_port, stop, wait_until

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
        try:
            return httpx.get(f"{url}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, seconds=60, what=f"the server ({log})")
        yield process, url
    finally:
        stop(process)
