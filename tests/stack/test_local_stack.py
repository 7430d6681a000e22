"""The whole local stack as a user starts and stops it: `cifar10 up --detach`, a crash, `cifar10 down`."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from ml.database import transaction
from ml.settings import PROJECT_ROOT, load_settings
from tests.conftest import free_port, wait_until

PORTS = ("AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT", "REPORTS_PORT", "POSTGRES_PORT")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    ports = {name: str(free_port()) for name in PORTS}
    folder = tmp_path_factory.mktemp("var")
    return (
        os.environ
        | ports
        | {
            "MLOPS_VAR_DIR": str(folder),
            "CIFAR10_SOURCE": "synthetic",
            "GATE_POLICY": str(quick_policy(folder / "gate.toml")),
            "INT8_CALIBRATION_IMAGES": "64",
        }
    )


def quick_policy(path):
    """The project's own, on fewer images: VGG16 on ten thousand is a minute of this machine."""
    text = (PROJECT_ROOT / "policies/gate.toml").read_text()
    for key, many, few in (
        ("agreement_images", "1000", "100"),
        ("corrupted_images", "100", "20"),
        ("corrupted_accuracy", "0.3", "0.1"),
    ):
        text, changed = re.subn(rf"^{key} = {many}\b", f"{key} = {few}", text, flags=re.MULTILINE)
        assert changed == 1, key
    path.write_text(text)
    return path


def cifar10(environment, *arguments):
    command = [sys.executable, "-m", "ml.cli", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
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


def test_no_secret_stands_in_a_log_and_none_can_be_read_by_others(stack, environment):
    var = Path(environment["MLOPS_VAR_DIR"])
    secrets = json.loads((var / "secrets.json").read_text()).values()
    logs = [path for path in (var / "log").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if any(secret in path.read_text(errors="replace") for secret in secrets)]
    private = [var / "secrets.json", var / "stack" / "stack.env", var / "airflow" / "passwords.json"]
    assert [oct(path.stat().st_mode)[-3:] for path in private] == ["600"] * 3


def test_a_second_stack_on_the_same_ports_is_refused_before_anything_starts(stack, environment, tmp_path):
    code, result, _ = cifar10(environment | {"MLOPS_VAR_DIR": str(tmp_path)}, "up", "--detach")
    assert code == 1
    assert result["error"]["type"] == "PortTaken"
    assert all(name in result["error"]["message"] for name in PORTS)
    assert not (tmp_path / "postgres").exists()


@pytest.mark.timeout(900)
def test_the_demo_runs_the_whole_loop_on_generated_data_and_says_so(stack, environment):
    code, result, progress = cifar10(environment, "demo")
    assert code == 0, (result, progress)
    assert json.loads((Path(environment["MLOPS_VAR_DIR"]) / "demo.json").read_text()) == result
    assert (result["dataset"]["data"], result["dataset"]["train"], result["dataset"]["test"]) == (
        "SYNTHETIC",
        6000,
        1000,
    )
    assert "SYNTHETIC" in progress
    accuracies = {model["name"]: model["test_accuracy"] for model in result["models"]}
    assert accuracies.keys() == {"baseline", "vgg16"}
    assert accuracies["baseline"] > 0.45
    assert result["champion"]["name"] == max(accuracies, key=accuracies.get)
    assert result["prediction"]["model"]["version"] == result["champion"]["version"]
    assert (result["drift"]["clean"]["n"], result["drift"]["shifted"]["n"]) == (300, 300)
    assert result["drift"]["shifted"]["verdict"] == "drift"
    assert result["drift"]["clean"]["p_value"] > result["drift"]["shifted"]["p_value"]
    ended = {run["dag_id"] for run in result["dag_runs"] if run["state"] == "success"}
    assert len(ended) == 5
    assert result["retraining"]["due"]
    assert result["urls"] == stack

    counts = {}
    with (
        transaction(load_settings(mlops_var_dir=environment["MLOPS_VAR_DIR"]).database_url) as connection,
        connection.cursor() as cursor,
    ):
        for table in ("predictions", "feedback", "alerts", "retrainings"):
            cursor.execute(f"SELECT count(*) FROM {table}")
            counts[table] = cursor.fetchone()[0]
    assert counts == {"predictions": 600, "feedback": 600, "alerts": 1, "retrainings": 1}


def test_a_database_of_ones_own_is_refused_rather_than_ignored(environment, tmp_path):
    other = {"MLOPS_VAR_DIR": str(tmp_path), "MLOPS_DATABASE_URL": "postgresql://me@elsewhere/predictions"}
    code, result, _ = cifar10(environment | other, "up", "--detach")
    assert code == 2
    assert "MLOPS_DATABASE_URL" in result["error"]["message"]
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
    assert not (Path(environment["MLOPS_VAR_DIR"]) / "stack" / "stack.env").exists()
    assert cifar10(environment, "down")[1] == {"stopped": False, "swept": 0}
