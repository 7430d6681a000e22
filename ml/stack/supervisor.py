"""Runs a graph of jobs and services as child processes, restarts what crashes, and leaves nothing behind.

Knows nothing of what the processes are: `ml.stack.components` says that. Each service runs in a process group of its
own, so that a Ctrl-C in the terminal reaches the supervisor alone, which then stops them in reverse order.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import psutil

from ml.errors import CifarError, ComponentFailed

logger = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
STARTS_BEFORE_GIVING_UP = 3
LONGEST_PAUSE_S = 30.0
HEALTHY_AFTER_S = 60.0
REAP_EVERY_S = 2.0

State = Literal["waiting", "starting", "running", "done", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class Job:
    """Something done once, such as a migration. `after` names the units that must be ready first."""

    name: str
    run: Callable[[], None]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Service:
    """A process that is kept running. `ready` asks it, without raising, whether it can be used."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    ready: Callable[[], bool]
    after: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    user: str | None = None
    stop_signal: int = signal.SIGTERM
    patience_s: float = 20.0
    start_timeout_s: float = 180.0


Unit = Job | Service


@dataclass(frozen=True)
class Status:
    """Where a unit stands. `created` is the process' start time (seconds since the epoch), to know it from a later
    process that was given the same pid."""

    name: str
    state: State
    detail: str = ""
    pid: int | None = None
    created: float | None = None
    restarts: int = 0


class Supervisor:
    """Starts `units` as their dependencies become ready and keeps them running until `stop`.

    `on_change` is called, from several threads but never at once, with each unit's new status.
    """

    def __init__(self, units: Sequence[Unit], on_change: Callable[[Status], None]) -> None:
        self.units = {unit.name: unit for unit in units}
        self._on_change = on_change
        self._statuses = {name: Status(name, "waiting") for name in self.units}
        self._ready = {name: threading.Event() for name in self.units}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._changed = threading.Condition(threading.RLock())
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(unit,), daemon=True) for unit in units]
        self._threads.append(threading.Thread(target=self._reap_adopted, daemon=True))

    def start(self) -> None:
        """Starts everything; returns at once."""
        _adopt_orphans()
        for thread in self._threads:
            thread.start()

    def wait_ready(self) -> None:
        """Returns when every job is done and every service is ready.

        Raises:
            ComponentFailed: for the first unit that failed, with the end of its log.
        """
        with self._changed:
            while not all(event.is_set() for event in self._ready.values()):
                failed = [status for status in self._statuses.values() if status.state == "failed"]
                if failed:
                    raise ComponentFailed(
                        f"{failed[0].name} did not start: {failed[0].detail}",
                        fix="mend what its log says and start again.",
                    )
                if self._stopping.is_set():
                    return
                self._changed.wait(1.0)

    def ask_to_stop(self) -> None:
        """Starts nothing more; safe in a signal handler. `stop` then does the stopping."""
        self._stopping.set()

    def stop(self) -> None:
        """Stops every service, dependants first, and whatever they left behind."""
        self.ask_to_stop()
        for level in reversed(self._levels()):
            threads = [threading.Thread(target=self._stop_service, args=(s,)) for s in level if isinstance(s, Service)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for thread in self._threads:
            thread.join(timeout=5)
        kill_all(psutil.Process().children(recursive=True))

    # --- one unit's life -------------------------------------------------------------------------------------------

    def _keep(self, unit: Unit) -> None:
        if not self._await_dependencies(unit):
            return
        try:
            if isinstance(unit, Job):
                self._set(unit.name, "starting")
                unit.run()
                self._set(unit.name, "done")
                self._ready[unit.name].set()
            else:
                self._run_service(unit)
        except (CifarError, OSError, subprocess.SubprocessError) as error:
            self._set(unit.name, "failed", detail=error.message if isinstance(error, CifarError) else str(error))
        except Exception as error:
            logger.exception("%s", unit.name)
            self._set(unit.name, "failed", detail=f"{type(error).__name__}: {error}")

    def _await_dependencies(self, unit: Unit) -> bool:
        with self._changed:
            while not all(self._ready[name].is_set() for name in unit.after):
                if self._stopping.is_set():
                    return False
                self._changed.wait(1.0)
        return not self._stopping.is_set()

    def _run_service(self, service: Service) -> None:
        failures = 0
        while not self._stopping.is_set():
            process = self._launch(service)
            if process is None:
                return
            started = time.monotonic()
            if self._await_ready(service, process):
                self._set(service.name, "running")
                self._ready[service.name].set()
                reason = describe_exit(process.wait())
                failures = 1 if time.monotonic() - started > HEALTHY_AFTER_S else failures + 1
            else:
                code = process.poll()
                reason = f"not ready after {service.start_timeout_s:.0f} s" if code is None else describe_exit(code)
                failures += 1
            if self._stopping.is_set():
                return
            # Its children may hold its port: the next start would fail on that.
            kill_group(process.pid)
            process.wait()
            detail = f"{reason}; log: {service.log}"
            if failures >= STARTS_BEFORE_GIVING_UP and not self._ready[service.name].is_set():
                raise ComponentFailed(f"{detail}\n{tail(service.log)}", fix="mend what the log names.")
            pause = min(LONGEST_PAUSE_S, 2.0 ** (failures - 1))
            restarts = self._statuses[service.name].restarts + 1
            self._set(service.name, "restarting", detail=f"{detail}; again in {pause:.0f} s", restarts=restarts)
            self._stopping.wait(pause)

    def _launch(self, service: Service) -> "subprocess.Popen[bytes] | None":
        if service.prepare is not None:
            service.prepare()
        service.log.parent.mkdir(parents=True, exist_ok=True)
        with self._changed, service.log.open("ab") as log:
            # Under the lock, so that a stop never misses a process that is just being born.
            if self._stopping.is_set():
                return None
            process = subprocess.Popen(
                service.command,
                env=dict(service.environment),
                user=service.user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self._processes[service.name] = process
        self._set(service.name, "starting", pid=process.pid, created=_created(process.pid))
        return process

    def _await_ready(self, service: Service, process: "subprocess.Popen[bytes]") -> bool:
        deadline = time.monotonic() + service.start_timeout_s
        while time.monotonic() < deadline and process.poll() is None and not self._stopping.is_set():
            if service.ready():
                return True
            self._stopping.wait(0.25)
        return False

    def _stop_service(self, service: Service) -> None:
        process = self._processes.get(service.name)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(service.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                process.wait(service.patience_s)
        kill_group(process.pid)
        process.wait()
        self._set(service.name, "stopped")

    def _reap_adopted(self) -> None:
        # An adopted orphan that ends stays a zombie until its new parent asks for its exit code. Only one that was a
        # zombie at the last look too: a child that somebody here waits for is gone by then.
        seen: set[psutil.Process] = set()
        while not self._stopping.wait(REAP_EVERY_S):
            own = {process.pid for process in self._processes.values()}
            zombies = {child for child in psutil.Process().children() if child.pid not in own and _is_zombie(child)}
            for zombie in zombies & seen:
                with suppress(ChildProcessError):
                    os.waitpid(zombie.pid, os.WNOHANG)
            seen = zombies

    # --- the whole -------------------------------------------------------------------------------------------------

    def _set(self, name: str, state: State, **changes: object) -> None:
        with self._changed:
            status = replace(self._statuses[name], state=state, **{"detail": "", **changes})  # type: ignore[arg-type]
            self._statuses[name] = status
            self._on_change(status)
            self._changed.notify_all()

    def _levels(self) -> list[list[Unit]]:
        depth: dict[str, int] = {}

        def measure(name: str) -> int:
            if name not in depth:
                depth[name] = 1 + max((measure(parent) for parent in self.units[name].after), default=-1)
            return depth[name]

        for name in self.units:
            measure(name)
        return [
            [u for u in self.units.values() if depth[u.name] == d] for d in range(max(depth.values(), default=-1) + 1)
        ]


def kill_group(group: int) -> None:
    """Ends what is left of a process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_all(processes: Sequence[psutil.Process], patience_s: float = 5.0) -> None:
    """Asks processes to end, then kills those that have not."""
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _created(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _adopt_orphans() -> None:
    # A grandchild whose parent dies is then handed to this process instead of to init, where it would be lost from
    # sight. Linux alone has it; elsewhere process groups must do.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
