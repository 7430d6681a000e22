"""The evaluation of a registered version, against scikit-learn and the same measurements made directly."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support

from ml.datasets.store import load_split
from ml.errors import ConfigurationError, DatasetNotFound, ModelNotFound, RegistryUnavailable
from ml.evaluation.measurement import calibration_interval
from ml.evaluation.metrics import calibration_error
from ml.evaluation.robustness import CORRUPTION_SEED, robustness
from ml.registry.versions import Registry
from ml.serving.engine import Engine
from ml.settings import PROJECT_ROOT
from ml.workflows.evaluate import evaluate
from tests.tiny_models import nearest_mean
from tests.tiny_versions import empty_registry, register_tiny, small_dataset


@pytest.fixture(scope="module")
def _policy(tmp_path_factory):
    """The project's, with few images in each cell."""
    path = tmp_path_factory.mktemp("policy") / "gate.toml"
    shipped = (PROJECT_ROOT / "policies" / "gate.toml").read_text()
    assert "corrupted_images = 100 " in shipped
    path.write_text(shipped.replace("corrupted_images = 100 ", "corrupted_images = 12 "))
    return path


@pytest.fixture
def here(settings, mlflow_uri, _policy):
    empty_registry(mlflow_uri)
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri, "gate_policy": _policy})


@pytest.fixture
def version(here, tmp_path):
    manifest = small_dataset(here, train=120, test=60)
    train = load_split(here.data_url, manifest.dataset_id, "train")
    return register_tiny(here, manifest, tmp_path, model=nearest_mean(train.images, train.labels))


def test_the_figures_are_scikit_learns_and_the_result_is_attached(here, version, tmp_path):
    found = evaluate(here, version=version.version)
    test = load_split(here.data_url, version.dataset_id, "test")
    engine = Engine(tmp_path / "trained.onnx")
    probabilities = engine.predict(test.images)
    predicted, exact = probabilities.argmax(axis=1), probabilities.astype(np.float64)
    precision, recall, f1, _ = precision_recall_fscore_support(
        test.labels, predicted, labels=range(10), average="macro", zero_division=0
    )
    expected = {
        "accuracy": accuracy_score(test.labels, predicted),
        "loss": log_loss(test.labels, exact / exact.sum(axis=1, keepdims=True), labels=range(10)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "calibration_error": calibration_error(test.labels, probabilities),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert (found["calibration_low"], found["calibration_high"]) == calibration_interval(test.labels, probabilities)
    few = load_split(here.data_url, version.dataset_id, "test", 12)
    alone = robustness(engine.predict, few.images, few.labels, seed=CORRUPTION_SEED)
    assert found["corrupted"] == alone.as_dict()
    assert [len(found["corrupted"]["cells"]), len(found["corrupted"]["cells"]["fog"])] == [15, 5]
    assert {key: found[key] for key in ("version", "architecture", "dataset_id", "data", "n")} == {
        "version": 1,
        "architecture": "baseline",
        "dataset_id": version.dataset_id,
        "data": "SYNTHETIC",
        "n": 60,
    }
    attached = Registry(here.tracking_uri).read_attached(version, "evaluation/sample.json")
    assert json.loads(attached) == json.loads(json.dumps(found, allow_nan=False))


def test_in_full_every_cell_has_every_test_image(here, version):
    Registry(here.tracking_uri).set_alias("champion", version.version)
    found = evaluate(here, full=True)
    assert (found["version"], found["n"], found["corrupted"]["n"]) == (1, 60, 60)
    attached = json.loads(Registry(here.tracking_uri).read_attached(version, "evaluation/full.json"))
    assert attached["corrupted"] == found["corrupted"]


def test_a_limit_holds_for_the_clean_images_and_for_each_cell(here, version):
    found = evaluate(here, version=1, limit=10)
    assert (found["n"], found["corrupted"]["n"]) == (10, 10)
    found = evaluate(here, version=1, limit=20)
    assert (found["n"], found["corrupted"]["n"]) == (20, 12)
    found = evaluate(here, version=1, limit=20, full=True)
    assert (found["n"], found["corrupted"]["n"]) == (20, 20)
    with pytest.raises(ModelNotFound):  # cut short, it is not the full one
        Registry(here.tracking_uri).read_attached(version, "evaluation/full.json")
    with pytest.raises(ConfigurationError):
        evaluate(here, version=1, limit=0)


def test_another_dataset_is_measured_on_and_named(here, version, caplog):
    other = small_dataset(here, train=20, test=30, seed=7)
    found = evaluate(here, alias="challenger", dataset_id=other.dataset_id, limit=12)
    assert found["dataset_id"] == other.dataset_id
    assert "may be among these test images" in caplog.text
    with pytest.raises(DatasetNotFound):
        evaluate(here, version=1, dataset_id="ds-000000000000")


def test_what_is_not_there_is_said_and_is_no_outage(here, version):
    with pytest.raises(ModelNotFound, match="bears the alias champion") as error:
        evaluate(here)
    assert "--version" in error.value.fix
    with pytest.raises(ModelNotFound):
        evaluate(here, version=99)
    with pytest.raises(RegistryUnavailable):
        evaluate(here.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}), version=1)
