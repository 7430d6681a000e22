"""The inspection of a version against a real MLflow: a sound one holds every check, each defect fails its own.

A process of its own takes Keras' ten seconds: one test has one, the others inspect here or play the process.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from typer.testing import CliRunner

from ml.cli import app
from ml.errors import DatasetNotFound, ModelInvalid, ModelNotFound, RegistryUnavailable
from ml.evaluation.golden import Golden, choose
from ml.registry.signature import read_signature
from ml.registry.versions import Registry
from ml.serving.engine import Engine
from ml.settings import PROJECT_ROOT
from ml.workflows import inspect_version as workflow
from ml.workflows.inspect_version import NAMES, inspect_in_fresh_process, inspect_version
from tests.tiny_models import PIXELS, make_onnx, nearest_mean
from tests.tiny_versions import Files, empty_registry, int8_files, register_tiny, small_dataset

POLICY = (PROJECT_ROOT / "policies" / "gate.toml").read_text()


@dataclass(frozen=True)
class Sound:
    """A real model in both forms, and its golden images."""

    files: Files
    golden: Golden
    parts: dict[str, np.ndarray]
    """Its weights and bias."""

    def golden_of(self, onnx):
        """The golden images as another file would answer them."""
        return replace_probabilities(self.golden, Engine(onnx).predict(self.golden.images))


def replace_probabilities(golden, probabilities):
    return Golden(golden.images, golden.labels, probabilities)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Tells ten colours apart, each of them a class."""
    import keras

    from ml.training.export import export

    labels = np.arange(50) % 10
    colours = np.random.default_rng(0).integers(30, 226, (10, 3))
    noise = np.random.default_rng(1).normal(scale=10, size=(50, 32, 32, 3))
    images = np.clip(colours[labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)
    parts = nearest_mean(images, labels)
    dense = keras.layers.Dense(10, activation="softmax")
    image = keras.Input((32, 32, 3))
    model = keras.Model(image, dense(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))))
    dense.set_weights([parts["weights"], parts["bias"]])
    exported = export(model, tmp_path_factory.mktemp("sound"), images)
    golden = choose(images, labels, Engine(exported.onnx).predict(images))
    return Sound(Files(exported.keras, exported.onnx), golden, parts)


@pytest.fixture
def here(settings, mlflow_uri):
    empty_registry(mlflow_uri)
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@pytest.fixture
def register(here, sound, tmp_path):
    """Registers the sound model, with what is given in its stead."""
    manifest = small_dataset(here)

    def made(onnx=None, golden=None, keras=None, int8=None):
        files = Files(keras or sound.files.keras, onnx or sound.files.onnx)
        more = {"int8": int8_files(tmp_path / "work", *int8[:1], golden=int8[1])} if int8 else {}
        return register_tiny(here, manifest, tmp_path / "work", files=files, golden=golden or sound.golden, **more)

    return made


def with_policy(settings, tmp_path, was, instead):
    assert was in POLICY
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.replace(was, instead))
    return settings.model_copy(update={"gate_policy": path})


def found(settings, version=1, engine=None):
    """The checks by name."""
    result = inspect_version(settings, version, engine)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert tuple(check["name"] for check in result["checks"]) == NAMES
    return {check["name"]: check for check in result["checks"]}


def failing(checks):
    return {name for name, check in checks.items() if not check["holds"]}


def test_a_sound_version_holds_every_check(here, register):
    register()
    checks = found(here)
    assert failing(checks) == set()
    assert checks["agreement"]["figure"] < checks["agreement"]["bound"] == 0.001
    assert checks["golden images"]["figure"] == 10
    assert 0 < checks["p95 latency"]["figure"] < 100
    assert checks["size"]["figure"] == pytest.approx(PIXELS * 10 * 4 / 2**20, rel=0.05)
    assert (checks["p95 latency"]["unit"], checks["size"]["unit"]) == ("ms", "MiB")
    assert not here.cache_dir.exists(), "it kept something"


def test_files_of_two_models_do_not_agree(here, register, sound, tmp_path):
    other = make_onnx(tmp_path / "other.onnx", **{**sound.parts, "bias": sound.parts["bias"] + np.eye(10)[3]})
    register(onnx=other, golden=sound.golden_of(other))
    checks = found(here)
    assert failing(checks) == {"agreement"}
    assert checks["agreement"]["figure"] > 0.001


def test_a_keras_file_that_cannot_be_read_fails_the_agreement_alone(here, register, tmp_path):
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"no model")
    register(keras=broken)
    checks = found(here)
    assert failing(checks) == {"agreement"}
    assert "Keras cannot use model.keras" in checks["agreement"]["says"]


def test_a_truncated_file_fails_where_it_is_opened_and_the_rest_is_not_reached(here, register, sound, tmp_path):
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(sound.files.onnx.read_bytes()[:-1000])
    register(onnx=cut)
    checks = found(here)
    assert failing(checks) == set(NAMES) - {"fetches", "size"}
    for name in ("signature", "server's engine"):
        assert "cannot be loaded" in checks[name]["says"]
    for name in ("agreement", "golden images", "p95 latency"):
        assert checks[name]["says"].startswith("not reached: the server's engine")
        assert checks[name]["figure"] is None


def test_another_shape_is_named_with_what_is_wanted(here, register, tmp_path):
    register(onnx=make_onnx(tmp_path / "eleven.onnx", classes=11))
    checks = found(here)
    assert "(-1, 11); " in checks["signature"]["says"]
    assert "(-1, 10) wanted" in checks["signature"]["says"]
    assert "(1, 11)" in checks["server's engine"]["says"]
    assert failing(checks) == set(NAMES) - {"fetches", "size"}


def test_not_a_number_holds_nothing(here, register, sound, tmp_path):
    register(onnx=make_onnx(tmp_path / "nan.onnx", bias=np.full(10, np.nan)))
    checks = found(here)
    assert failing(checks) == set(NAMES) - {"fetches", "signature", "size"}
    assert "NaN" in checks["server's engine"]["says"]


def test_golden_images_must_be_of_all_classes_and_answered_as_they_were(here, register, sound):
    golden = sound.golden
    register(golden=Golden(golden.images[1:], golden.labels[1:], golden.probabilities[1:]))
    checks = found(here)
    assert failing(checks) == {"golden images"}
    assert "9 of 10 classes right" in checks["golden images"]["says"]
    assert "none kept of airplane" in checks["golden images"]["says"]
    register(golden=replace_probabilities(golden, golden.probabilities + np.float32(0.002)))
    checks = found(here, 2)
    assert failing(checks) == {"golden images"}
    assert checks["golden images"]["figure"] == 10
    empty = Golden(golden.images[:0], golden.labels[:0], golden.probabilities[:0])
    register(golden=empty)
    assert failing(found(here, 3)) == {"golden images"}


def test_a_version_of_before_golden_images_fails_theirs_in_words(here, register):
    import mlflow

    version = register()
    mlflow.MlflowClient(here.tracking_uri, here.tracking_uri).delete_model_version_tag(
        version.name, "1", "sha256.golden.npz"
    )
    checks = found(here)
    assert failing(checks) == {"golden images"}
    assert "has no golden.npz" in checks["golden images"]["says"]


def test_the_form_that_serves_is_inspected_and_int8_is_held_to_float32(here, register, sound):
    golden = sound.golden
    shifted = replace_probabilities(golden, golden.probabilities + np.float32(0.02))
    register(int8=(sound.parts, shifted))
    registry = Registry(here.tracking_uri)
    assert failing(found(here)) == set(), "float32 serves until another form is chosen"
    registry.set_tags(1, {"engine": "int8"})
    checks = found(here)
    assert failing(checks) == set(), "0.02 is within what int8 may differ by"
    assert "model.int8.onnx" in checks["size"]["says"]
    assert "int8 takes 1.0000 of them for the same class" in checks["agreement"]["says"]
    assert failing(found(here, engine="fp32")) == set()
    registry.set_tags(1, {"sha256.model.int8.onnx": "0" * 64})
    assert "not reached" in found(here)["size"]["says"]
    assert failing(found(here, engine="fp32")) == set()

    other = {**sound.parts, "bias": sound.parts["bias"] + 5 * np.eye(10)[3]}
    register(int8=(other, golden))
    assert {"agreement", "golden images"} <= failing(found(here, 2, "int8"))
    registry.set_tags(2, {"engine": "int4"})
    with pytest.raises(ModelInvalid, match="int4"):
        inspect_version(here, 2)


def test_size_and_latency_have_bounds(here, register, tmp_path):
    register()
    assert failing(found(with_policy(here, tmp_path, "size_mib = 200.0", "size_mib = 0.01"))) == {"size"}
    slow = with_policy(here, tmp_path, "p95_latency_ms = 100.0", "p95_latency_ms = 1e-6")
    assert failing(found(slow)) == {"p95 latency"}


def test_a_file_that_is_not_the_registered_one_is_not_used(here, register):
    register()
    registry = Registry(here.tracking_uri)
    registry.set_tags(1, {"sha256.card.md": "0" * 64})
    checks = found(here)
    assert failing(checks) == {"fetches"}
    assert "another card.md" in checks["fetches"]["says"]
    registry.set_tags(1, {"sha256.model.onnx": "0" * 64})
    checks = found(here)
    assert failing(checks) == set(NAMES)
    assert checks["size"]["says"] == "not reached: model.onnx could not be fetched"


def test_what_mlflow_declares_is_held_to_as_well(here, register):
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    version = register()
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    root = client.get_model_version_download_uri(version.name, "1")
    get_artifact_repository(root, tracking_uri=here.tracking_uri).delete_artifacts("MLmodel")
    checks = found(here)
    assert failing(checks) == {"signature"}
    assert "lost its file MLmodel" in checks["signature"]["says"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- a list",
        "{",
        "flavors: {}",
        'flavors: {}\nsignature:\n  inputs: \'[{"type": "long"}]\'\n  outputs: null\n',
    ],
)
def test_a_declaration_of_something_else_is_the_models_fault(tmp_path, content):
    (tmp_path / "MLmodel").write_text(content)
    with pytest.raises(ModelInvalid, match="MLmodel declares no signature"):
        read_signature(tmp_path / "MLmodel")


def test_what_could_not_be_asked_says_nothing_of_the_version(here, register, tmp_path):
    register()
    with pytest.raises(ModelNotFound):
        inspect_version(here, 7)
    with pytest.raises(RegistryUnavailable):
        inspect_version(here.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}), 1)
    with pytest.raises(DatasetNotFound):
        inspect_version(here.model_copy(update={"mlops_data_url": (tmp_path / "none").as_uri()}), 1)


def test_the_command_shows_a_table_or_json_and_ends_with_0_whatever_it_found(here, register, sound, monkeypatch):
    golden = sound.golden
    register(golden=Golden(golden.images[1:], golden.labels[1:], golden.probabilities[1:]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here.tracking_uri)
    monkeypatch.setenv("MLOPS_DATA_URL", here.data_url)
    monkeypatch.setenv("MLOPS_VAR_DIR", str(here.mlops_var_dir))
    shown = CliRunner().invoke(app, ["inspect", "1"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Version 1: 1 of 7 checks failed" in shown.stdout
    for name in NAMES:
        assert name in shown.stdout
    assert CliRunner().invoke(app, ["inspect", "7", "--json"]).exit_code == 1
    assert CliRunner().invoke(app, ["inspect", "0"]).exit_code == 2


def test_a_process_of_its_own_finds_the_same(here, register, tmp_path, monkeypatch):
    register()
    bounded = with_policy(here, tmp_path, "size_mib = 200.0", "size_mib = 0.01")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # what it is told counts, not what stands around
    checks = inspect_in_fresh_process(bounded, 1, "fp32")
    assert tuple(check.name for check in checks) == NAMES
    assert [check.name for check in checks if not check.holds] == ["size"]
    assert {check.group for check in checks} == {"mechanical"}
    assert next(check for check in checks if check.name == "size").bound == 0.01
    # Neither imports Keras.
    (missing,) = inspect_in_fresh_process(here, 7)
    assert (missing.name, missing.holds) == ("fresh process", False)
    with pytest.raises(RegistryUnavailable) as error:
        inspect_in_fresh_process(here.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}), 1)
    assert "make up" in error.value.fix


ALL_HOLD = [{"name": name, "holds": True, "says": "", "figure": None, "bound": None, "unit": ""} for name in NAMES]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("sys.exit('no memory')", "ended with code 1 and gave no answer that can be read; its last words: no memory"),
        ("print('[]')", "gave no answer that can be read; it said nothing"),
        ("print('{\"checks\": 3}')", "gave no answer"),
        ("print('{\"checks\": []}')", "other checks"),
        (f"print({json.dumps({'checks': ALL_HOLD[1:]})!r})", "other checks"),
        (f"print({json.dumps({'checks': ALL_HOLD})!r}); sys.exit(3)", "code 3"),
        ('print(\'{"error": {"type": "CifarError", "message": "KeyError: 3", "fix": ""}}\')', "KeyError: 3"),
        ("time.sleep(60)", "gave no answer within 1 s"),
    ],
)
def test_a_process_that_gives_no_answer_is_a_failed_check(settings, monkeypatch, code, said):
    command = (sys.executable, "-S", "-c", f"import os, signal, sys, time\n{code}")
    monkeypatch.setattr(workflow, "_COMMAND", command)
    patience = 1.0 if "sleep" in code else 60.0
    (check,) = inspect_in_fresh_process(settings, 1, timeout_seconds=patience)
    assert (check.name, check.group, check.holds) == ("fresh process", "mechanical", False)
    assert said in check.says


@pytest.mark.parametrize("kind", ["RegistryUnavailable", "StorageError", "DatasetNotFound", "ConfigurationError"])
def test_an_error_that_says_nothing_of_the_version_is_raised_as_it_was(settings, monkeypatch, kind):
    answer = json.dumps({"error": {"type": kind, "message": "Gone.", "fix": "bring it."}})
    monkeypatch.setattr(workflow, "_COMMAND", (sys.executable, "-S", "-c", f"print({answer!r}); raise SystemExit(1)"))
    with pytest.raises(Exception, match="Gone") as error:
        inspect_in_fresh_process(settings, 1)
    assert (type(error.value).__name__, error.value.fix) == (kind, "bring it.")
