"""The training workflow against a real MLflow, on the stand-in: what is registered, and what a failure leaves."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from ml.datasets import store, synthetic
from ml.errors import ConfigurationError, DatasetNotFound, RegistryUnavailable, TrainingDiverged
from ml.models.specs import BaselineSpec, Vgg16Spec
from ml.monitoring.image_statistics import image_statistics
from ml.monitoring.reference import read_reference
from ml.registry.versions import Registry
from ml.serving.engine import Engine
from ml.settings import Settings
from ml.training.recipe import BaselineRecipe, Vgg16Recipe

BASELINE = BaselineRecipe(
    name="tiny",
    epochs=2,
    learning_rate=0.005,
    train_limit=300,
    validation_limit=60,
    test_limit=80,
    model=BaselineSpec(filters=(8,), dense_units=16, batch_norm_momentum=0.5),
)
VGG16 = Vgg16Recipe(
    name="tiny",
    epochs=1,
    learning_rate=0.003,
    fine_tuning_epochs=1,
    fine_tuning_learning_rate=0.0001,
    train_limit=32,
    validation_limit=60,
    test_limit=80,
    model=Vgg16Spec(dense_units=16),
)


@pytest.fixture
def ready(settings: Settings, mlflow_uri: str) -> tuple[Settings, str]:
    """Settings with a real MLflow, and the id of a stored SYNTHETIC dataset."""
    settings = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    manifest = store.write_dataset(synthetic.generate(train=1000, test=100, seed=4), settings.data_url)
    return settings, manifest.dataset_id


def test_a_baseline_becomes_a_version_with_all_its_evidence(ready: tuple[Settings, str], tmp_path: Path) -> None:
    from ml.workflows.train import train

    settings, dataset_id = ready
    client = MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name("cifar10")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("cifar10")
    cut_off = client.create_run(experiment_id, tags={"origin": "dag/run"}).info.run_id
    result = train(settings, "baseline", dataset_id, BASELINE, origin="dag/run")
    assert json.loads(json.dumps(result)) == result
    assert (result["architecture"], result["dataset_id"], result["data"]) == ("baseline", dataset_id, "SYNTHETIC")
    assert (result["weights"], result["test_n"]) == ("from scratch", 80)

    assert client.get_run(cut_off).info.status == "KILLED"
    run = client.get_run(str(result["run_id"]))
    assert run.info.status == "FINISHED"
    assert run.data.tags["origin"] == "dag/run"
    assert run.data.params["epochs"] == "2"
    assert run.data.params["model.dense_units"] == "16"
    assert run.data.params["images.train"] == "300"
    assert (run.data.tags["dataset_id"], run.data.tags["data"]) == (dataset_id, "SYNTHETIC")
    assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [dataset_id]
    for name in ("fit/loss", "fit/accuracy", "fit/val_loss", "fit/val_accuracy"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [0, 1]
    assert run.data.metrics["test_accuracy"] == pytest.approx(result["test_accuracy"])
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"plots", "metrics.json", "history.json", "recipe.json"} <= names
    plots = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "plots")}
    assert plots == {"learning_curves.png", "confusion_validation.png", "confusion_test.png"}
    measured = json.loads(Path(client.download_artifacts(run.info.run_id, "metrics.json", str(tmp_path))).read_text())
    assert len(measured["test"]["classes"]) == 10
    assert np.sum(measured["test"]["confusion"]) == 80

    registry = Registry(settings.tracking_uri)
    challenger = registry.by_alias("challenger")
    assert challenger is not None
    assert challenger.version == result["version"]
    assert (challenger.architecture, challenger.data, challenger.decision) == ("baseline", "SYNTHETIC", "pending")
    assert challenger.weights == "from scratch"
    artifacts = registry.fetch(challenger, tmp_path / "cache") / "artifacts"
    # What monitoring will compare with is what this very file says of the validation images.
    reference = read_reference(artifacts / "reference.parquet")
    validation = store.load_split(settings.data_url, dataset_id, "validation", 60)
    assert np.array_equal(reference.labels, validation.labels)
    assert np.allclose(reference.probabilities, Engine(artifacts / "model.onnx").predict(validation.images), atol=1e-5)
    for name, values in image_statistics(validation.images).items():
        assert np.allclose(reference.statistics[name], values)
    accuracy = (reference.class_ids == reference.labels).mean()
    assert float(challenger.tags["metric.validation_accuracy"]) == pytest.approx(accuracy)


def test_vgg16_keeps_both_stages_and_says_that_its_weights_are_random(ready: tuple[Settings, str]) -> None:
    from ml.workflows.train import train

    settings, dataset_id = ready
    result = train(settings, "vgg16", dataset_id, VGG16)
    assert result["weights"] == "RANDOM WEIGHTS"
    assert [stage["name"] for stage in result["stages"]] == ["head", "top"]  # type: ignore[attr-defined]
    metrics = MlflowClient(settings.tracking_uri).get_run(str(result["run_id"])).data.metrics
    assert {"head/val_accuracy", "top/val_accuracy"} <= set(metrics)
    version = Registry(settings.tracking_uri).by_version(int(str(result["version"])))
    assert (version.architecture, version.weights) == ("vgg16", "RANDOM WEIGHTS")


def test_a_diverged_training_registers_nothing_and_fails_its_run(
    ready: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.models.catalog import build
    from ml.training import fit
    from ml.workflows.train import train

    settings, dataset_id = ready

    def with_infinite_bias(spec: BaselineSpec, weights: None) -> object:
        model = build(spec, weights)
        kernel, bias = model.get_layer("dense").get_weights()
        model.get_layer("dense").set_weights([kernel, np.full_like(bias, np.inf)])
        return model

    monkeypatch.setattr(fit, "build", with_infinite_bias)
    client = MlflowClient(settings.tracking_uri)
    before = {version.version for version in Registry(settings.tracking_uri).versions()}
    with pytest.raises(TrainingDiverged):
        train(settings, "baseline", dataset_id, BASELINE)
    assert {version.version for version in Registry(settings.tracking_uri).versions()} == before
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (latest, *_) = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    assert latest.info.status == "FAILED"
    assert "loss became" in latest.data.tags["error"]


def test_what_cannot_work_is_said_before_anything_is_trained(
    ready: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training import fit
    from ml.workflows.train import train

    settings, dataset_id = ready
    monkeypatch.setattr(fit, "train", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(ConfigurationError, match="is for baseline, not for vgg16"):
        train(settings, "vgg16", dataset_id, BASELINE)
    with pytest.raises(DatasetNotFound):
        train(settings, "baseline", "ds-000000000000", BASELINE)
    with pytest.raises(RegistryUnavailable):
        train(
            settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}), "baseline", dataset_id, BASELINE
        )


def test_a_retraining_is_by_the_same_recipe_with_a_seed_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training.recipe import load_recipe
    from ml.workflows import train as workflow

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(workflow, "train", lambda *asked, origin: calls.append((*asked, origin)) or {})
    for retraining_id in (None, 1, 2, 2):
        workflow.train_by_name(
            settings, "baseline", dataset_id="ds-0", recipe="demo", retraining_id=retraining_id, origin="dag/run"
        )
    demo = load_recipe("baseline", "demo")
    seeds = [demo.seed, demo.seed + 1, demo.seed + 2, demo.seed + 2]
    assert calls == [(settings, "baseline", "ds-0", demo.with_overrides(seed=seed), "dag/run") for seed in seeds]
    with pytest.raises(ConfigurationError, match="no recipe"):
        workflow.train_by_name(settings, "baseline", dataset_id="ds-0", recipe="none such")
