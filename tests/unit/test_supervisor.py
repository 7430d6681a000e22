"""The supervisor over small real processes: order, restarts, failures, and nothing left behind."""

import os
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from ml.errors import ComponentFailed
from ml.stack.supervisor import Job, Service, Supervisor
from tests.conftest import wait_until

FOREVER = "import time; time.sleep(600)"


class Record:
    """Every status in its order, and a way to wait for one."""

    def __init__(self):
        self.seen = []
        self._changed = threading.Condition()

    def __call__(self, status):
        with self._changed:
            self.seen.append(status)
            self._changed.notify_all()

    def wait_for(self, name, state, *, times=1, seconds=20):
        def found():
            return [s for s in self.seen if (s.name, s.state) == (name, state)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= times, seconds), self.seen
            return found()[times - 1]

    def order(self, state):
        return [status.name for status in self.seen if status.state == state]


@pytest.fixture
def record():
    return Record()


@pytest.fixture
def supervise(record):
    running = []

    def start(*units):
        running.append(Supervisor(units, record))
        running[-1].start()
        return running[-1]

    yield start
    for supervisor in running:
        supervisor.stop()


@pytest.fixture
def service(tmp_path):
    def make(name, code=FOREVER, **changes):
        options = {"ready": lambda: True, "patience_s": 5.0} | changes
        return Service(name, (sys.executable, "-c", code), {}, tmp_path / f"{name}.log", **options)

    return make


def test_a_unit_starts_only_when_what_it_needs_is_ready(supervise, service, record):
    migrated = threading.Event()
    supervise(
        service("server", after=("migration",)),
        Job("migration", lambda: (time.sleep(0.3), migrated.set()), after=("database",)),
        service("database"),
    ).wait_ready()
    assert migrated.is_set()
    assert record.order("starting") == ["database", "migration", "server"]


def test_a_service_that_is_not_ready_yet_holds_back_its_dependants(supervise, service, record):
    ready = threading.Event()
    supervise(service("slow", ready=ready.is_set), service("dependant", after=("slow",)))
    record.wait_for("slow", "starting")
    time.sleep(0.5)
    assert "dependant" not in record.order("starting")
    ready.set()
    record.wait_for("dependant", "running")


def test_a_crash_is_shown_and_the_service_runs_again(supervise, service, record):
    supervisor = supervise(service("worker"))
    supervisor.wait_ready()
    first = record.wait_for("worker", "starting").pid
    psutil.Process(first).kill()
    restarting = record.wait_for("worker", "restarting")
    assert "SIGKILL" in restarting.detail
    second = record.wait_for("worker", "starting", times=2).pid
    assert second != first
    assert record.wait_for("worker", "running", times=2).restarts == 1


def test_a_service_that_never_starts_fails_the_stack_with_the_end_of_its_log(supervise, service):
    supervisor = supervise(service("broken", "import sys; sys.exit('no such table')", ready=lambda: False))
    with pytest.raises(ComponentFailed, match=r"(?s)broken did not start.*exit code 1.*no such table"):
        supervisor.wait_ready()


def test_a_job_that_fails_fails_the_stack(supervise, service):
    def fail():
        raise ComponentFailed("The migration broke.", fix="mend it.")

    supervisor = supervise(Job("migration", fail), service("server", after=("migration",)))
    with pytest.raises(ComponentFailed, match="The migration broke"):
        supervisor.wait_ready()


def test_stop_ends_dependants_before_what_they_need(supervise, service, record):
    supervisor = supervise(service("database"), service("server", after=("database",)))
    supervisor.wait_ready()
    supervisor.stop()
    assert record.order("stopped") == ["server", "database"]


def test_a_fault_that_nobody_foresaw_fails_the_stack_instead_of_hanging_it(supervise):
    def fail():
        raise LookupError("no such revision")

    with pytest.raises(ComponentFailed, match="LookupError: no such revision"):
        supervise(Job("migration", fail)).wait_ready()


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def test_stop_ends_a_process_that_will_not_and_a_child_that_left_its_group(supervise, service, tmp_path, record):
    told = tmp_path / "child"
    unit = service("stubborn", STUBBORN, ready=lambda: told.exists() and told.read_text() != "", patience_s=0.5)
    supervisor = supervise(replace(unit, command=(*unit.command, str(told))))
    supervisor.wait_ready()
    pids = [record.wait_for("stubborn", "starting").pid, int(told.read_text())]
    assert all(psutil.pid_exists(pid) for pid in pids)
    supervisor.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)


ORPHANING = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", "import subprocess, sys; print(subprocess.Popen(['sleep', '0.2']).pid)"],
               stdout=open(sys.argv[1], "w"))
time.sleep(600)
"""


def test_an_orphan_that_ends_is_not_left_a_zombie(supervise, service, tmp_path):
    told = tmp_path / "orphan"
    unit = service("orphaning", ORPHANING, ready=lambda: told.exists() and told.read_text() != "")
    supervise(replace(unit, command=(*unit.command, str(told)))).wait_ready()
    wait_until(lambda: not psutil.pid_exists(int(told.read_text())), seconds=15, what="the orphan's end")


def test_a_stop_in_mid_start_leaves_nothing(supervise, service, record):
    supervisor = supervise(service("slow", ready=lambda: False), service("dependant", after=("slow",)))
    pid = record.wait_for("slow", "starting").pid
    supervisor.stop()
    assert not psutil.pid_exists(pid)
    assert "dependant" not in record.order("starting")


def test_each_service_has_a_process_group_of_its_own(supervise, service, record):
    # A Ctrl-C in the terminal goes to the terminal's group: it must reach the supervisor alone.
    supervise(service("worker")).wait_ready()
    pid = record.wait_for("worker", "starting").pid
    assert os.getpgid(pid) == pid
    assert os.getpgid(pid) != os.getpgid(0)
