"""Up, down and status of the local stack, and the file that says where it stands.

One stack per var folder: a lock keeps a second supervisor out. The state file outlives a supervisor that was killed,
so that `down` finds what it left.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ml.errors import ComponentFailed, StackError
from ml.files import write_whole
from ml.settings import PROJECT_ROOT, Settings, load_settings, stack_env_file
from ml.stack import components
from ml.stack.ports import require_free
from ml.stack.secret_store import OWNER_ONLY, load_or_create
from ml.stack.supervisor import Status, Supervisor, kill_all, tail

logger = logging.getLogger(__name__)

STOP_PATIENCE_S = 90.0
START_PATIENCE_S = 300.0


def up(settings: Settings, on_ready: Callable[[], None]) -> None:
    """Starts the stack and keeps it running in the foreground until SIGINT or SIGTERM; stops all of it then.

    Raises:
        PortTaken: before anything starts.
        StackError: when a stack of this var folder runs already.
        ComponentFailed: when a part does not start; everything is stopped again.
    """
    with _only_one(settings):
        sweep(settings)
        secrets = load_or_create(settings.mlops_var_dir)
        components.require_own_addresses(settings, secrets)
        require_free(components.ports(settings))
        environment = components.shared_environment(settings, secrets)
        env_file = "".join(f"{name}='{value}'\n" for name, value in environment.items())
        write_whole(stack_env_file(settings.mlops_var_dir), env_file, mode=OWNER_ONLY)
        state = _StateFile(settings)
        supervisor = Supervisor(components.units(settings, secrets), state.record)
        asked_to_stop = threading.Event()

        def ask_to_stop(*_: object) -> None:
            asked_to_stop.set()
            supervisor.ask_to_stop()

        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, ask_to_stop)
        try:
            supervisor.start()
            supervisor.wait_ready()
            if not asked_to_stop.is_set():
                state.ready()
                on_ready()
            asked_to_stop.wait()
        finally:
            logger.info("stopping")
            supervisor.stop()
            _forget(settings)


def start_in_background(settings: Settings) -> None:
    """Starts the stack as a process of its own that outlives this one; returns when all of it is ready.

    Raises:
        PortTaken, ComponentFailed: as `up`.
    """
    components.require_own_addresses(settings, load_or_create(settings.mlops_var_dir))
    require_free(components.ports(settings))
    log = settings.mlops_var_dir / "log" / "stack.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ml.cli", "up"],
            env=_environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    shown: dict[str, str] = {}
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        found = status(settings)
        for name, unit in found["units"].items():
            if shown.get(name) != unit["state"] and unit["state"] in ("running", "done", "restarting", "failed"):
                shown[name] = unit["state"]
                logger.info("%s %s %s", name, unit["state"], unit["detail"])
        if found["state"] == "running":
            return
        if process.poll() is not None or time.monotonic() > deadline:
            down(settings)
            raise ComponentFailed(f"The stack did not start:\n{tail(log)}", fix=f"mend what {log} names.")
        time.sleep(0.25)


def down(settings: Settings) -> dict[str, Any]:
    """Stops the stack of this var folder, and whatever a killed supervisor left. Idempotent.

    Raises:
        ComponentFailed: when a process survives.
    """
    state = _read_state(settings)
    supervisor = _alive(state.get("pid"), state.get("created"))
    if supervisor is not None:
        logger.info("stopping; a task that runs is given %.0f s", STOP_PATIENCE_S)
        supervisor.send_signal(signal.SIGTERM)
        with suppress(psutil.TimeoutExpired):
            supervisor.wait(STOP_PATIENCE_S)
    swept = sweep(settings)
    left = processes(settings)
    if left:
        raise ComponentFailed(
            f"These processes of the stack did not end: {', '.join(str(p.pid) for p in left)}.", fix="kill them."
        )
    return {"stopped": supervisor is not None or swept > 0, "swept": swept}


def status(settings: Settings) -> dict[str, Any]:
    """`{"state", "detail", "units": {name: {...}}, "urls": {...}}`, as it stands now.

    `state` is "running" (every part), "starting" (some part is on its way, or again), "orphaned" (the supervisor was
    killed and left parts running) or "down".
    """
    state = _read_state(settings)
    if _alive(state.get("pid"), state.get("created")) is None:
        left = len(processes(settings))
        if left:
            detail = f"its supervisor has ended and {left} processes run on; `make down` ends them"
            return {"state": "orphaned", "detail": detail, "units": {}, "urls": components.urls(settings)}
        return {"state": "down", "detail": "", "units": {}, "urls": {}}
    units = state.get("units", {})
    waiting = [unit["name"] for unit in units.values() if unit["state"] not in ("running", "done")]
    if waiting or not state.get("ready"):
        detail = f"waiting for {', '.join(waiting)}" if waiting else ""
        return {"state": "starting", "detail": detail, "units": units, "urls": components.urls(settings)}
    return {"state": "running", "detail": "", "units": units, "urls": components.urls(settings)}


def sweep(settings: Settings) -> int:
    """Ends what a supervisor that was killed left running; returns how many processes that were."""
    left = processes(settings)
    kill_all(left)
    _forget(settings)
    return len(left)


def _forget(settings: Settings) -> None:
    # Where a stack that has ended could be found: nobody is to ask there any more.
    for path in (_state_path(settings), stack_env_file(settings.mlops_var_dir)):
        path.unlink(missing_ok=True)


def settings_of_running(settings: Settings) -> Settings:
    """The settings with what the running stack wrote: the database's address above all."""
    return load_settings(mlops_var_dir=settings.mlops_var_dir)


def processes(settings: Settings) -> list[psutil.Process]:
    """Every process of the stack, its supervisor included, but never the caller."""
    # Three traces, since none holds alone: the environment's mark (Airflow overwrites it when it renames
    # itself), the process groups in the state file, and descent from a process found by either.
    state = _read_state(settings)
    units = state.get("units", {}).values()
    groups = {u["pid"] for u in units if u["pid"] is not None and _is_ours(u["pid"], u["created"])}
    supervisor = _alive(state.get("pid"), state.get("created"))
    found = set() if supervisor is None else {supervisor}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            marked = process.environ().get(components.STACK_MARK) == str(settings.mlops_var_dir)
            if marked or os.getpgid(process.pid) in groups:
                found.add(process)
    for process in list(found):
        with suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return [process for process in found if process.pid != os.getpid()]


def _is_ours(group: int, created: float | None) -> bool:
    # A group whose leader has died is still the stack's; one whose leader was born later is somebody else's.
    try:
        return created is None or abs(psutil.Process(group).create_time() - created) < 1
    except psutil.NoSuchProcess:
        return True


def _alive(pid: int | None, created: float | None) -> psutil.Process | None:
    if pid is None or created is None:
        return None
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1 and process.status() != "zombie" else None
    except psutil.NoSuchProcess:
        return None


def _environment_of(settings: Settings) -> dict[str, str]:
    chosen = {
        "CIFAR10_SOURCE": settings.cifar10_source,
        "VGG16_WEIGHTS": settings.vgg16_weights,
        "MLOPS_VAR_DIR": str(settings.mlops_var_dir),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    return dict(os.environ) | chosen | {name: str(port) for name, port in components.ports(settings).items()}


class _StateFile:
    """Says on disk, and in the log, where each unit stands."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._state: dict[str, Any] = {
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            "ready": False,
            "units": {},
        }
        self._lock = threading.Lock()
        self._write()

    def record(self, status: Status) -> None:
        with self._lock:
            self._state["units"][status.name] = asdict(status)
            self._write()
        level = logging.WARNING if status.state in ("restarting", "failed") else logging.INFO
        elapsed = time.monotonic() - self._began
        logger.log(level, "%5.1f s  %-22s %s %s", elapsed, status.name, status.state, status.detail)

    def ready(self) -> None:
        with self._lock:
            self._state["ready"] = True
            self._write()

    def _write(self) -> None:
        write_whole(_state_path(self._settings), json.dumps(self._state, indent=2), mode=OWNER_ONLY)


def _state_path(settings: Settings) -> Path:
    return settings.mlops_var_dir / "stack" / "state.json"


def _read_state(settings: Settings) -> dict[str, Any]:
    try:
        return dict(json.loads(_state_path(settings).read_text()))
    except FileNotFoundError:
        return {}


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    path = settings.mlops_var_dir / "stack" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(
                f"A stack of {settings.mlops_var_dir} runs already.", fix="use it, or stop it with `make down`."
            ) from error
        yield
