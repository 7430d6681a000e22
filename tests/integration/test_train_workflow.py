"""The training workflow against a real MLflow, on the stand-in: what is registered, and what a failure leaves."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from ml.datasets import store, synthetic
from ml.datasets.manifest import Split
from ml.errors import ConfigurationError, DatasetNotFound, RegistryUnavailable, TrainingDiverged, TrainingError
from ml.evaluation.golden import read_golden
from ml.evaluation.model_card import SECTIONS
from ml.models.specs import BaselineSpec, Vgg16Spec
from ml.monitoring.image_statistics import image_statistics
from ml.monitoring.reference import read_reference
from ml.registry.versions import FP32, INT8, ModelVersion, Registry
from ml.serving.engine import Engine
from ml.settings import Settings
from ml.training.recipe import BaselineRecipe, Stage, Vgg16Recipe, load_recipe
from tests.conftest import wait_until

BASELINE = BaselineRecipe(
    name="tiny",
    stages=(Stage(name="fit", epochs=2, learning_rate=0.005),),
    train_limit=300,
    validation_limit=60,
    test_limit=80,
    corrupted_limit=10,
    model=BaselineSpec(filters=(8,), dense_units=16, batch_norm_momentum=0.5),
)
VGG16 = Vgg16Recipe(
    name="tiny",
    stages=(
        Stage(name="head", epochs=1, learning_rate=0.003, unfreeze_from="dense"),
        Stage(name="top", epochs=1, learning_rate=0.0001, unfreeze_from="block5_conv1"),
    ),
    batch_size=32,
    train_limit=32,
    validation_limit=60,
    test_limit=80,
    model=Vgg16Spec(dense_units=16),
)
# With all that a resumed training must remember.
LONG = BASELINE.with_overrides(
    {
        "name": "long",
        "stages": [
            {"name": "fit", "epochs": 5, "learning_rate": 0.005, "schedule": "cosine"},
            {"name": "head", "epochs": 1, "learning_rate": 0.001, "unfreeze_from": "dense"},
        ],
        "augmentation": {"flip": True, "cutout": 6},
        "weight_averaging": 0.9,
    }
).model_copy(update={"corrupted_limit": None})


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
    assert run.data.params["stages.fit.epochs"] == "2"
    assert run.data.params["stages.fit.learning_rate"] == "0.005"
    assert run.data.params["optimizer.name"] == "adam"
    assert run.data.params["model.dense_units"] == "16"
    assert run.data.params["images.train"] == "300"
    tags = {"dataset_id": dataset_id, "data": "SYNTHETIC", "architecture": "baseline", "recipe": "tiny"} | {
        "recipe.digest": BASELINE.digest, "seed": "0", "weights": "from scratch", "weights.sha256": "none",
        "keras.backend": "tensorflow", "command": "cifar10 reproduce",
    }  # fmt: skip
    assert {key: run.data.tags[key] for key in tags} == tags
    assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [dataset_id]
    for name in ("fit/loss", "fit/accuracy", "fit/val_loss", "fit/val_accuracy"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [0, 1]
    assert run.data.metrics["test_accuracy"] == pytest.approx(result["test_accuracy"])
    assert {"fit_seconds", "wall_seconds", "peak_memory_mib", "test_loss", "validation_accuracy"} <= set(
        run.data.metrics
    )
    assert run.data.metrics["test_corrupted_accuracy"] == pytest.approx(result["corrupted_accuracy"])
    assert {"plots", "metrics.json", "history.json", "recipe.json", "robustness.json"} <= {
        item.path for item in client.list_artifacts(run.info.run_id)
    }
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
    right = reference.class_ids == reference.labels
    check_golden_images(artifacts, {image.tobytes() for image in validation.images[right]}, reference.labels[right])
    described = client.get_model_version(challenger.name, str(result["version"])).description
    check_card((artifacts / "card.md").read_text(), result, described)
    assert float(challenger.tags["metric.validation_accuracy"]) == pytest.approx(right.mean())
    check_int8(registry, challenger, tmp_path / "cache", validation)


def check_int8(registry: Registry, version: ModelVersion, cache: Path, validation: Split) -> None:
    """Another form of the same model, with its own word on the validation images; float32 serves until it is chosen."""
    assert (version.tags["int8"], version.form) == ("made", FP32)
    artifacts = registry.fetch(version, cache, INT8.files) / "artifacts"
    given = Engine(artifacts / INT8.onnx).predict(validation.images)
    reference, golden = read_reference(artifacts / INT8.reference), read_golden(artifacts / INT8.golden)
    assert np.allclose(reference.probabilities, given, atol=1e-5)
    by_fp32 = read_reference(artifacts / "reference.parquet").probabilities
    assert 0 < np.abs(given - by_fp32).max() < 0.1
    assert np.allclose(Engine(artifacts / INT8.onnx).predict(golden.images), golden.probabilities, atol=1e-5)
    accuracy = (reference.class_ids == reference.labels).mean()
    assert f"validation accuracy of {accuracy:.4f}" in (artifacts / "card.md").read_text()
    assert float(version.tags["metric.int8_validation_accuracy"]) == pytest.approx(accuracy)


def check_golden_images(artifacts: Path, right: set[bytes], classes: np.ndarray) -> None:
    """They are images that this very file has right, one of each class of which there is one."""
    golden = read_golden(artifacts / "golden.npz")
    assert golden.labels.tolist() == sorted(set(classes.tolist()))
    assert {image.tobytes() for image in golden.images} <= right
    assert np.allclose(Engine(artifacts / "model.onnx").predict(golden.images), golden.probabilities, atol=1e-5)


def check_card(card: str, result: dict[str, object], described: str) -> None:
    for heading in SECTIONS:
        assert f"\n## {heading}\n" in card
    under_corruption = f"| mean over all | {result['corrupted_accuracy']:.4f} ["
    made_by = f"`cifar10 reproduce {result['run_id']}`"
    for told in ("**SYNTHETIC**", made_by, BASELINE.digest, under_corruption, f"| {result['test_accuracy']:.4f} ["):
        assert told in card
    assert described.startswith(card[:1000])
    assert len(described) <= 5000


def test_vgg16_keeps_both_stages_and_says_that_its_weights_are_random(ready: tuple[Settings, str]) -> None:
    from ml.workflows.train import train

    settings, dataset_id = ready
    result = train(settings, "vgg16", dataset_id, VGG16)
    assert result["weights"] == "RANDOM WEIGHTS"
    assert [stage["name"] for stage in result["stages"]] == ["head", "top"]  # type: ignore[attr-defined]
    run = MlflowClient(settings.tracking_uri).get_run(str(result["run_id"]))
    assert {"head/val_accuracy", "top/val_accuracy"} <= set(run.data.metrics)
    assert run.data.tags["weights"] == "RANDOM WEIGHTS"
    assert [stage["cached_from"] for stage in result["stages"]] == ["flatten", "block4_pool"]  # type: ignore[attr-defined]
    assert len(list((settings.cache_dir / "features").glob("*.npy"))) == 4, "the next training finds them there"
    assert result["corrupted_accuracy"] is None
    version = Registry(settings.tracking_uri).by_version(int(str(result["version"])))
    assert (version.architecture, version.weights, version.tags["int8"]) == ("vgg16", "RANDOM WEIGHTS", "made")


def test_a_diverged_training_registers_nothing_and_fails_its_run(
    ready: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training import fit
    from ml.training.checkpoint import Checkpoint, Position
    from ml.workflows.train import train

    settings, dataset_id = ready

    def diverge(*_: object, checkpoint: Checkpoint, position: Position, **__: object) -> None:
        checkpoint.save(position)  # as after an epoch that was still well
        raise TrainingDiverged("the loss became nan", fix="lower the rate.")

    monkeypatch.setattr(fit, "train", diverge)
    client = MlflowClient(settings.tracking_uri)
    before = {version.version for version in Registry(settings.tracking_uri).versions()}
    with pytest.raises(TrainingDiverged):
        train(settings, "baseline", dataset_id, BASELINE)
    assert list(settings.checkpoints_dir.glob("*.npz")) == [], "resumed, it would diverge again"
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
    with pytest.raises(ConfigurationError, match="batches of 4096, and there are 887 training images"):
        train(settings, "baseline", dataset_id, BASELINE.model_copy(update={"train_limit": None, "batch_size": 4096}))
    with pytest.raises(DatasetNotFound):
        train(settings, "baseline", "ds-000000000000", BASELINE)
    with pytest.raises(RegistryUnavailable):
        train(
            settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}), "baseline", dataset_id, BASELINE
        )


def history_of(settings: Settings, run_id: object, name: str) -> list[tuple[int, float]]:
    found = MlflowClient(settings.tracking_uri).get_metric_history(str(run_id), name)
    return [(entry.step, entry.value) for entry in found]


def test_a_killed_training_goes_on_in_its_run_and_comes_to_the_same_figures(
    ready: tuple[Settings, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ml.workflows.train import train

    settings, dataset_id = ready
    with pytest.raises(TrainingError, match="no checkpoint of recipe 'long'"):
        train(settings, "baseline", dataset_id, LONG, resume="required")
    code = """
import json, sys, time
from pathlib import Path
from ml.settings import Settings
from ml.training.checkpoint import Checkpoint
from ml.training.recipe import parse_recipe
from ml.workflows.train import train
asked = json.loads(Path(sys.argv[1]).read_text())
settings = Settings(_env_file=None, **asked["settings"])
save = Checkpoint.save
def save_and_stay(checkpoint, position):
    save(checkpoint, position)
    if len(position.epochs) == 3:
        time.sleep(600)  # however late the kill comes, it comes within the training
Checkpoint.save = save_and_stay
train(settings, "baseline", asked["dataset"], parse_recipe(asked["recipe"], origin="x"), origin="dag/killed")
"""
    given = {
        "mlops_var_dir": str(settings.mlops_var_dir),
        "mlops_data_url": settings.data_url,
        "mlflow_tracking_uri": settings.tracking_uri,
    }
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"settings": given, "dataset": dataset_id, "recipe": LONG.model_dump(mode="json")}))
    with (tmp_path / "killed.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, str(asked)], stdout=log, stderr=log)

    def saved() -> bool:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        return any(settings.checkpoints_dir.glob("*.npz"))

    try:
        wait_until(saved, seconds=180, what="the first checkpoint")
    finally:
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    (checkpoint,) = settings.checkpoints_dir.glob("*.npz")
    client = MlflowClient(settings.tracking_uri)
    with np.load(checkpoint) as file:
        position = json.loads(file["facts"].tobytes())
    killed = client.get_run(position["run_id"])
    assert killed.info.status == "RUNNING", "nobody could say that it was killed"
    assert position["stage"] == 0
    assert 1 <= len(position["epochs"]) <= 3

    result = train(settings, "baseline", dataset_id, LONG, origin="dag/killed", resume="required")
    assert result["run_id"] == killed.info.run_id
    run = client.get_run(killed.info.run_id)
    assert (run.info.status, run.data.tags["resumed"]) == ("FINISHED", "1")
    assert list(settings.checkpoints_dir.glob("*.npz")) == [], "it is done"

    whole = train(settings, "baseline", dataset_id, LONG, register=False)
    assert whole["run_id"] != result["run_id"]
    assert (whole["name"], whole["version"]) == (None, None)
    for stage, epochs in (("fit", 5), ("head", 1)):
        for figure in ("loss", "accuracy", "val_loss", "val_accuracy"):
            one, other = (history_of(settings, r["run_id"], f"{stage}/{figure}") for r in (result, whole))
            assert [step for step, _ in one] == list(range(epochs)), "every epoch once"
            assert one == other
        assert len(history_of(settings, result["run_id"], f"{stage}/images_per_second")) == epochs
    for figure in ("validation_accuracy", "test_accuracy", "precision", "recall", "loss"):
        assert result[figure] == whole[figure]


@pytest.fixture
def cut_off(ready: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Ends a training in MLflow's call after so many epochs, as an outage does; gives its run's id."""
    from ml.registry import tracking
    from ml.workflows.train import train

    settings, dataset_id = ready

    def cut(recipe: BaselineRecipe, after: int) -> str:
        log_metrics, runs = tracking.Run.log_metrics, []

        def refuse(run: tracking.Run, metrics: dict[str, float], step: int = 0) -> None:
            runs.append(run.id)
            if len(runs) == after:
                raise RegistryUnavailable("MLflow is away.", fix="start it.")
            log_metrics(run, metrics, step)

        with monkeypatch.context() as patched:
            patched.setattr(tracking.Run, "log_metrics", refuse)
            with pytest.raises(RegistryUnavailable):
                train(settings, "baseline", dataset_id, recipe)
        return str(runs[0])

    return cut


def test_resuming_is_asked_for_and_only_of_the_same_training(
    ready: tuple[Settings, str], cut_off: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training import fit
    from ml.workflows.train import train

    settings, dataset_id = ready
    recipe = BASELINE.model_copy(update={"corrupted_limit": None})
    run_id = cut_off(recipe, after=1)  # saved, and not yet in MLflow
    (checkpoint,) = settings.checkpoints_dir.glob("*.npz")
    whole = checkpoint.read_bytes()

    positions: list[Any] = []

    class StoppedError(Exception):
        pass

    def stop(*_: object, position: Any, **__: object) -> None:
        positions.append(position)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(fit, "train", stop)
        # Another seed is another training: none to resume, and if there is none, from the start.
        other = recipe.with_overrides({"seed": 5})
        with pytest.raises(TrainingError, match=r"seed 5\) on ds-"):
            train(settings, "baseline", dataset_id, other, resume="required")
        with pytest.raises(StoppedError):
            train(settings, "baseline", dataset_id, other, resume="if there")
        assert (positions[-1].epochs, positions[-1].model) == ([], [])
        checkpoint.write_bytes(whole[:1000])
        with pytest.raises(TrainingError, match="cannot be read"):
            train(settings, "baseline", dataset_id, recipe, resume="if there")
        checkpoint.write_bytes(whole)
    result = train(settings, "baseline", dataset_id, recipe, resume="if there")
    assert result["run_id"] == run_id
    assert [step for step, _ in history_of(settings, run_id, "fit/val_loss")] == [0, 1]

    cut_off(recipe, after=2)
    with monkeypatch.context() as patched:
        patched.setattr(fit, "train", stop)
        with pytest.raises(StoppedError):
            train(settings, "baseline", dataset_id, recipe)
    assert positions[-1].epochs == [], "not asked to resume, it starts anew"
    assert positions[-1].run_id != run_id
    assert not checkpoint.exists()


def test_a_retraining_is_by_the_same_recipe_with_a_seed_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.workflows import train as workflow

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(workflow, "train", lambda *asked, origin, resume: calls.append((*asked, origin, resume)) or {})
    for asked in (
        {},
        {"retraining_id": 1},
        {"retraining_id": 2},
        {"retraining_id": 2},
        {"seed": 7, "retraining_id": 2},
    ):
        workflow.train_by_name(settings, "baseline", dataset_id="ds-0", recipe="demo", origin="dag/run", **asked)
    workflow.train_by_name(settings, "baseline", dataset_id="ds-0", recipe="demo", resume="if there")
    demo = load_recipe("baseline", "demo")
    seeds = [demo.seed, demo.seed + 1, demo.seed + 2, demo.seed + 2, 9]
    seeded = [(settings, "baseline", "ds-0", demo.with_overrides({"seed": seed}), "dag/run", "no") for seed in seeds]
    assert calls == [*seeded, (settings, "baseline", "ds-0", demo, None, "if there")]
    with pytest.raises(ConfigurationError, match="no recipe"):
        workflow.train_by_name(settings, "baseline", dataset_id="ds-0", recipe="none such")
