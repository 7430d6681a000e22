"""The whole local stack as a user starts and stops it: `cifar10 up --detach`, a crash, `cifar10 down`."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import free_port, wait_until

PORTS = ("AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT", "REPORTS_PORT", "POSTGRES_PORT")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    ports = {name: str(free_port()) for name in PORTS}
    return os.environ | ports | {"MLOPS_VAR_DIR": str(tmp_path_factory.mktemp("var")), "CIFAR10_SOURCE": "synthetic"}


def cifar10(environment, *arguments):
    command = [sys.executable, "-m", "ml.cli", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def stack(environment):
    code, result, progress = cifar10(environment, "up", "--detach")
    assert code == 0, (result, progress)
    yield result["urls"]
    cifar10(environment, "down")


def status(environment):
    return cifar10(environment, "status")[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


def runs(pid):
    """A zombie has ended; that nobody has asked for its exit code yet is its parent's affair."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_part_answers(stack):
    health = httpx.get(f"{stack['airflow']}/api/v2/monitor/health").json()
    assert health["scheduler"]["status"] == health["dag_processor"]["status"] == "healthy"
    assert httpx.get(f"{stack['mlflow']}/health").text == "OK"
    assert httpx.get(stack["reports"], follow_redirects=True).is_success
    assert httpx.get(f"{stack['predictions']}/healthz").is_success


def test_without_a_champion_the_server_is_up_and_says_it_is_not_ready(stack):
    answer = httpx.get(f"{stack['predictions']}/readyz")
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert "promote" in answer.json()["detail"]


def test_nothing_listens_beyond_loopback(stack, environment):
    state = json.loads((Path(environment["MLOPS_VAR_DIR"]) / "stack" / "state.json").read_text())
    mine = {process.pid for process in psutil.Process(state["pid"]).children(recursive=True)}
    open_ports = [c for c in psutil.net_connections("inet") if c.pid in mine and c.status == psutil.CONN_LISTEN]
    assert {str(c.laddr.port) for c in open_ports} >= {environment[name] for name in PORTS}
    assert {c.laddr.ip for c in open_ports} == {"127.0.0.1"}


def test_no_secret_stands_on_a_command_line(stack, environment):
    secrets = json.loads((Path(environment["MLOPS_VAR_DIR"]) / "secrets.json").read_text()).values()
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if any(secret in line for secret in secrets)]


def test_a_second_stack_on_the_same_ports_is_refused_before_anything_starts(stack, environment, tmp_path):
    code, result, _ = cifar10(environment | {"MLOPS_VAR_DIR": str(tmp_path)}, "up", "--detach")
    assert code == 1
    assert result["error"]["type"] == "PortTaken"
    assert all(name in result["error"]["message"] for name in PORTS)
    assert not (tmp_path / "postgres").exists()


def test_a_killed_component_is_shown_and_runs_again(stack, environment):
    before = status(environment)["units"]["prediction-server"]
    os.killpg(before["pid"], 9)

    def runs_again():
        now = status(environment)["units"]["prediction-server"]
        return now["state"] == "running" and now["restarts"] == before["restarts"] + 1

    wait_until(runs_again, seconds=60, what="the prediction server")
    assert httpx.get(f"{stack['predictions']}/healthz").is_success


def test_down_leaves_no_process_and_no_port_even_after_the_supervisor_was_killed(stack, environment):
    state = json.loads((Path(environment["MLOPS_VAR_DIR"]) / "stack" / "state.json").read_text())
    psutil.Process(state["pid"]).kill()
    time.sleep(0.5)
    assert listens(environment["API_PORT"])

    code, result, _ = cifar10(environment, "down")
    assert code == 0
    assert result["swept"] > 0
    assert not [name for name in PORTS if listens(environment[name])]
    assert not [u["name"] for u in state["units"].values() if u["pid"] and runs(u["pid"])]
    assert status(environment)["state"] == "down"
    assert cifar10(environment, "down")[1] == {"stopped": False, "swept": 0}
