"""`cifar10 predict` as a user and a program call it, against the real app on a port."""

import csv
import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr
from typer.testing import CliRunner
from werkzeug.serving import make_server

from deploy.server.app import create_app
from deploy.server.testing import MemoryLog
from ml.cli import app
from ml.client import BATCH
from ml.datasets.labels import CLASS_NAMES
from ml.serving.engine import Engine
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import make_onnx

IMAGES = np.random.default_rng(3).integers(0, 256, (BATCH + 6, 32, 32, 3), dtype=np.uint8)


class Asked:
    """A server on a free port, and the command that asks it."""

    def __init__(self, folder, settings):
        source = FolderSource(folder / "registry")
        self.onnx = make_onnx(folder / "1.onnx")
        source.crown(self.onnx, 4, weights="RANDOM WEIGHTS")
        follower = ChampionFollower(source, folder / "cache")
        follower.poll()
        self.log = MemoryLog()
        keyed = settings.model_copy(update={"prediction_api_keys": (SecretStr("the-key"),)})
        self._server = make_server("127.0.0.1", 0, create_app(keyed, follower=follower, log=self.log), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.environment = {
            "MLOPS_VAR_DIR": str(folder),
            "PREDICTIONS_URL": self.url,
            "PREDICTION_API_KEYS": "the-key,another",
        }

    def __call__(self, *arguments, stdin=None, **changes):
        return CliRunner().invoke(app, ["predict", *map(str, arguments)], stdin, env=self.environment | changes)

    def process(self, *arguments, **options):
        command = [sys.executable, "-m", "ml.cli", "predict", *map(str, arguments)]
        return subprocess.Popen(
            command, env=os.environ | self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def predict(tmp_path, settings, monkeypatch):
    # In this process: its logging must stay pytest's.
    monkeypatch.setattr("ml.cli._log_to_stderr", lambda: None)
    made = Asked(tmp_path, settings)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them broken, and what is no image."""
    made = tmp_path / "pictures"
    made.mkdir()
    Image.fromarray(IMAGES[0]).save(made / "a.png")
    Image.fromarray(IMAGES[1]).save(made / "c.WebP", lossless=True)
    (made / "b.jpg").write_bytes(b"\xff\xd8\xffno")
    (made / "notes.txt").write_text("no image")
    (made / "within").mkdir()
    return made


def test_json_is_one_object_with_a_row_for_each_image(predict, folder):
    done = predict(folder, folder / "gone.png", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["url"], found["asked"], found["failed"]) == (predict.url, 4, 2)
    a, b, c, gone = found["predictions"]
    assert [row["file"] for row in (a, b, c, gone)] == [
        str(folder / n) for n in ("a.png", "b.jpg", "c.WebP", "gone.png")
    ]
    expected = Engine(predict.onnx).predict(IMAGES[:2])
    for row, probabilities in zip((a, c), expected, strict=True):
        best = probabilities.argsort()[::-1]
        assert (row["label"], row["runner_up"]) == (CLASS_NAMES[best[0]], CLASS_NAMES[best[1]])
        np.testing.assert_allclose([row["probabilities"][name] for name in CLASS_NAMES], probabilities, atol=1e-6)
        assert (row["model_version"], row["data"], row["weights"]) == (4, "SYNTHETIC", "RANDOM WEIGHTS")
    logged = {str(prediction.request_id) for prediction in predict.log.predictions}
    assert {a["request_id"], c["request_id"]} <= logged
    assert b["error"]["type"] == "ImageUndecodable"
    assert str(folder / "b.jpg") in b["error"]["message"]
    assert gone["error"]["type"] == "ImageNotFound"
    assert predict(folder, folder / "gone.png", "--format", "json").stdout.count("\n") == 1


def test_csv_has_all_ten_probabilities(predict, folder):
    done = predict(folder / "a.png", folder / "b.jpg", "--format", "csv")
    assert done.exit_code == 1
    good, bad = csv.DictReader(io.StringIO(done.stdout))
    expected = Engine(predict.onnx).predict(IMAGES[:1])[0]
    np.testing.assert_allclose([float(good[f"p_{name}"]) for name in CLASS_NAMES], expected, atol=1e-6)
    assert (good["label"], good["error"]) == (CLASS_NAMES[expected.argmax()], "")
    assert (bad["file"], bad["label"], bad["p_cat"]) == (str(folder / "b.jpg"), "", "")
    assert "b.jpg: The image is not an image" in bad["error"]


def test_the_table_names_the_answer_the_runner_up_and_what_the_model_was_made_of(predict, folder):
    done = predict(folder / "a.png", COLUMNS="200")
    assert done.exit_code == 0
    first, second = Engine(predict.onnx).predict(IMAGES[:1])[0].argsort()[::-1][:2]
    for said in ("a.png", CLASS_NAMES[first], CLASS_NAMES[second], "4 (champion)", "SYNTHETIC", "RANDOM WEIGHTS"):
        assert said in done.stdout
    lines = predict(folder / "a.png", folder / "b.jpg", COLUMNS="20").stdout.splitlines()
    assert any(f"{folder}/a.png" in line and CLASS_NAMES[first] in line for line in lines), "one line to an image"
    assert f"{folder}/b.jpg: The image is not an image that can be read. Fix: send the bytes" in "\n".join(lines)


def test_many_files_keep_their_order(predict, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(many / f"{index:03}.png")
    rows = json.loads(predict(many, "--json").stdout)["predictions"]
    assert [row["class_id"] for row in rows] == Engine(predict.onnx).predict(IMAGES).argmax(axis=1).tolist()


def test_a_dash_is_one_image_on_stdin(predict, folder):
    found = json.loads(predict("-", "--json", stdin=(folder / "a.png").read_bytes()).stdout)
    assert [row["file"] for row in found["predictions"]] == ["-"]
    np.testing.assert_array_equal(predict.log.predictions[0].images, IMAGES[:1])


def test_the_key_comes_from_a_file_or_the_settings(predict, folder, tmp_path):
    (tmp_path / "key").write_text("the-key\n")
    keyless = {"PREDICTION_API_KEYS": ""}
    assert predict(folder / "a.png", "--api-key-file", tmp_path / "key", **keyless).exit_code == 0
    refused = predict(folder / "a.png", "--json", **keyless)
    assert (refused.exit_code, json.loads(refused.stdout)["error"]["type"]) == (2, "ConfigurationError")
    (tmp_path / "key").write_text("two keys")
    assert predict(folder / "a.png", "--api-key-file", tmp_path / "key").exit_code == 2


def test_a_folder_without_images_is_bad_usage(predict, folder):
    done = predict(folder / "within", "--json")
    assert done.exit_code == 2
    assert "holds no image" in json.loads(done.stdout)["error"]["message"]


def test_a_server_that_is_away_fails_the_work(predict, folder):
    done = predict(folder / "a.png", "--json", "--patience", "0", "--url", "http://127.0.0.1:9")
    assert (done.exit_code, json.loads(done.stdout)["error"]["type"]) == (1, "ServiceUnavailable")


def test_as_a_process_progress_is_on_stderr_and_a_reader_that_leaves_is_no_error(predict, folder):
    done = predict.process(folder / "a.png", "--json")
    stdout, stderr = done.communicate()
    assert (done.returncode, json.loads(stdout)["failed"]) == (0, 0)
    assert b"1 of 1 images answered" in stderr
    for form in ("csv", "table", "json"):
        left = predict.process(folder / "a.png", "--format", form)
        left.stdout.close()
        said = left.stderr.read()
        assert b"Traceback" not in said
        assert b"BrokenPipe" not in said
        assert left.wait() == 1
        left.stderr.close()
