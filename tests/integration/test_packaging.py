"""What a registered version is, against a real MLflow: files, tags, signature, and MLflow's own way of loading it."""

import json

import mlflow
import numpy as np
import pytest

from ml.errors import ModelInvalid, ModelNotFound
from ml.registry import tracking
from ml.registry.packaging import LONGEST_DESCRIPTION, description, register
from ml.registry.versions import MODEL_NAME, Registry
from ml.serving.engine import Engine
from tests.tiny_models import make_onnx
from tests.tiny_versions import Files, empty_registry, register_tiny, small_dataset


@pytest.fixture
def here(settings, mlflow_uri):
    empty_registry(mlflow_uri)
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


def download(tracking_uri, version, folder):
    """The whole version, by MLflow's own means."""
    root = mlflow.MlflowClient(tracking_uri, tracking_uri).get_model_version_download_uri(
        version.name, str(version.version)
    )
    return mlflow.artifacts.download_artifacts(root, dst_path=str(folder), tracking_uri=tracking_uri)


def test_a_version_says_what_it_is(here, tmp_path):
    manifest = small_dataset(here)
    version = register_tiny(here, manifest, tmp_path, validation_accuracy=0.625, architecture="vgg16")
    assert (version.name, version.version, version.aliases) == (MODEL_NAME, 1, ("challenger",))
    assert (version.architecture, version.dataset_id) == ("vgg16", manifest.dataset_id)
    assert (version.data, version.weights, version.decision) == ("SYNTHETIC", "RANDOM WEIGHTS", "pending")
    assert version.figure("metric.validation_accuracy") == 0.625
    assert len(version.tags["git_sha"]) in (7, 40)
    folder = Registry(here.tracking_uri).fetch(version, here.cache_dir)
    assert (folder / "artifacts/card.md").read_text() == "# A tiny model on SYNTHETIC data\n"
    assert (folder / "artifacts/golden.npz").read_bytes() == (tmp_path / "golden.npz").read_bytes()
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    assert client.get_model_version(MODEL_NAME, "1").description == "# A tiny model on SYNTHETIC data\n"


def test_a_card_that_is_too_long_for_mlflow_is_described_by_its_first_sections(here, tmp_path):
    section = "\n\n## Section\n\n" + "ü" * 1200
    card = "# Title" + section * 5
    found = description(card)
    assert len(found) <= LONGEST_DESCRIPTION
    assert found.startswith("# Title" + section * 4 + "\n\nMore stands in")
    assert description("# Short\n") == "# Short\n"
    assert len(description("x" * 9000)) == LONGEST_DESCRIPTION
    # What fits by our count fits by PostgreSQL's.
    register_tiny(here, small_dataset(here), tmp_path, card=card)
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    assert client.get_model_version(MODEL_NAME, "1").description == found
    folder = Registry(here.tracking_uri).fetch(1, here.cache_dir)
    assert (folder / "artifacts/card.md").read_text() == card


def test_challenger_follows_the_newest_version(here, tmp_path):
    manifest = small_dataset(here)
    register_tiny(here, manifest, tmp_path / "1")
    register_tiny(here, manifest, tmp_path / "2")
    assert Registry(here.tracking_uri).by_alias("challenger").version == 2


def test_a_resumed_run_registers_its_model_once(here, tmp_path):
    manifest = small_dataset(here)
    first = register_tiny(here, manifest, tmp_path / "1", model={"seed": 1})
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    run_id = client.get_model_version(MODEL_NAME, str(first.version)).run_id
    client.set_terminated(run_id, "KILLED")  # after the registration, before its end
    assert register_tiny(here, manifest, tmp_path / "2", model={"seed": 1}, run_id=run_id).version == first.version
    client.set_terminated(run_id, "KILLED")
    # Another model of the same run, or the same model of another run, is a version of its own.
    assert register_tiny(here, manifest, tmp_path / "3", model={"seed": 2}, run_id=run_id).version == 2
    assert register_tiny(here, manifest, tmp_path / "4", model={"seed": 1}).version == 3


def test_mlflow_loads_it_and_answers_as_the_engine_does(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path, model={"seed": 3})
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    onnx = Registry(here.tracking_uri).fetch(version, here.cache_dir) / "artifacts/model.onnx"
    expected = Engine(onnx).predict(images)

    model = mlflow.pyfunc.load_model(download(here.tracking_uri, version, tmp_path / "mlflow"))
    np.testing.assert_allclose(model.predict(images.astype(np.float32)), expected, atol=1e-6)

    inputs, outputs = model.metadata.signature.inputs.inputs[0], model.metadata.signature.outputs.inputs[0]
    assert (inputs.shape, outputs.shape) == ((-1, 32, 32, 3), (-1, 10))
    assert model.metadata.saved_input_example_info is not None
    requirements = next((tmp_path / "mlflow").rglob("requirements.txt")).read_text()
    assert "onnxruntime==" in requirements
    assert "numpy==" in requirements


def test_mlflows_scoring_server_answers_for_it(here, tmp_path):
    """`mlflow models serve` is this WSGI/ASGI application around the downloaded model."""
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    version = register_tiny(here, small_dataset(here), tmp_path, model={"seed": 3})
    downloaded = download(here.tracking_uri, version, tmp_path / "mlflow")
    client = TestClient(init(mlflow.pyfunc.load_model(downloaded)))
    body = json.dumps({"instances": np.full((2, 32, 32, 3), 7).tolist()})
    answer = client.post("/invocations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    rows = np.array(answer.json()["predictions"])
    assert rows.shape == (2, 10)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)


def test_a_figure_that_cannot_be_right_is_not_registered(here, tmp_path):
    with pytest.raises(ModelInvalid, match="validation_accuracy"):
        register_tiny(here, small_dataset(here), tmp_path, validation_accuracy=float("nan"))
    with pytest.raises(ModelNotFound):
        Registry(here.tracking_uri).by_version(1)


def test_missing_files_are_named(here, tmp_path):
    manifest = small_dataset(here)
    keras, reference, golden = tmp_path / "m.keras", tmp_path / "r.parquet", tmp_path / "g.npz"
    keras.touch()
    with tracking.run(here, "broken") as run:
        given = {
            "metrics": {"validation_accuracy": 0.5},
            "recipe": {},
            "manifest": manifest,
            "weights": "random",
            "reference": reference,
            "golden": golden,
            "int8": "none",
            "card": "",
            "input_example": np.zeros((1, 32, 32, 3), np.uint8),
            "data": "SYNTHETIC",
            "architecture": "baseline",
        }
        with pytest.raises(ModelInvalid, match=r"r\.parquet"):
            register(run, exported=Files(keras, make_onnx(tmp_path / "m.onnx")), **given)
        reference.touch()
        with pytest.raises(ModelInvalid, match=r"g\.npz"):
            register(run, exported=Files(keras, make_onnx(tmp_path / "m.onnx")), **given)
        golden.touch()
        with pytest.raises(ModelInvalid, match=r"gone\.onnx"):
            register(run, exported=Files(keras, tmp_path / "gone.onnx"), **given)
    assert Registry(here.tracking_uri).versions() == []
