"""The pretraining workflow against a real MLflow: a file that `VGG16_WEIGHTS` takes, and a run that tells of it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from pathlib import Path

import h5py
import numpy as np
import pytest
from mlflow import MlflowClient

from ml.datasets import store, synthetic
from ml.errors import ConfigurationError, TrainingDiverged, TrainingError
from ml.settings import Settings

RECIPE = """
name = "tiny"
architecture = "vgg16_base"
seed = 20
batch_size = 16
train_limit = 32
validation_limit = 20

[optimizer]
name = "adamw"

[[stages]]
name = "pretraining"
epochs = 1
learning_rate = 0.001
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def ready(settings: Settings, mlflow_uri: str) -> tuple[Settings, str]:
    """Settings with a real MLflow, and the id of a stored SYNTHETIC dataset."""
    settings = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    manifest = store.write_dataset(synthetic.generate(train=300, test=50, seed=4), settings.data_url)
    return settings, manifest.dataset_id


def test_its_weights_are_a_file_to_fine_tune_from(ready: tuple[Settings, str], recipe: Path, tmp_path: Path) -> None:
    from ml.models.catalog import build
    from ml.models.specs import VGG16_CONVOLUTIONS, Vgg16Spec
    from ml.models.vgg16_weights import resolve_weights
    from ml.workflows.pretrain import pretrain

    settings, dataset_id = ready
    made = pretrain(settings, dataset_id, recipe, tmp_path / "base.weights.h5")
    weights = resolve_weights(str(made["path"]), allow_stand_in=False, cache_dir=tmp_path / "cache")
    assert weights.sha256 == made["sha256"]
    assert str(made["origin"]) in weights.label
    assert "SYNTHETIC" in weights.label
    model = build(Vgg16Spec(dense_units=16), weights)
    with h5py.File(str(made["path"])) as file:
        for i, name in enumerate(VGG16_CONVOLUTIONS):
            kept = file[f"layers/conv2d_{i}/vars" if i else "layers/conv2d/vars"]  # Keras counts them
            for at, value in enumerate(model.get_layer(name).get_weights()):
                assert np.array_equal(value, kept[str(at)]), "the base comes from the file"

    client = MlflowClient(settings.tracking_uri)
    run = client.get_run(str(made["run_id"]))
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "cifar10-pretraining"
    assert run.data.tags["weights.sha256"] == made["sha256"]
    assert run.data.metrics["validation_accuracy"] == pytest.approx(made["validation_accuracy"])
    assert [item.path for item in client.list_artifacts(run.info.run_id, "weights")] == ["weights/base.weights.h5"]
    # Done: nothing is left to go on with.
    with pytest.raises(TrainingError):
        pretrain(settings, dataset_id, recipe, resume=True)


def test_a_divergence_leaves_a_failed_run_and_no_weights(
    ready: tuple[Settings, str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training import fit
    from ml.training.checkpoint import Checkpoint, Position
    from ml.workflows.pretrain import EXPERIMENT, pretrain

    def diverge(*_: object, checkpoint: Checkpoint, position: Position, **__: object) -> None:
        checkpoint.save(position)  # as after an epoch that was still well
        raise TrainingDiverged("the loss became nan", fix="lower the rate.")

    monkeypatch.setattr(fit, "train", diverge)
    settings, dataset_id = ready
    with pytest.raises(TrainingDiverged):
        pretrain(settings, dataset_id, recipe, tmp_path / "base.weights.h5")
    assert not (tmp_path / "base.weights.h5").exists()
    with pytest.raises(TrainingError):  # no checkpoint stays that would only diverge again
        pretrain(settings, dataset_id, recipe, resume=True)
    client = MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id], max_results=1)[0].info.status == "FAILED"


def test_what_cannot_work_is_refused_first(ready: tuple[Settings, str], recipe: Path, tmp_path: Path) -> None:
    from ml.workflows.pretrain import pretrain

    settings, dataset_id = ready
    with pytest.raises(ConfigurationError, match=r"\.weights\.h5"):
        pretrain(settings, dataset_id, recipe, tmp_path / "base.h5")
    recipe.write_text(RECIPE.replace("train_limit = 32", "train_limit = 10"))
    with pytest.raises(ConfigurationError, match="batch"):
        pretrain(settings, dataset_id, recipe)
    with pytest.raises(ConfigurationError, match="vgg16_base"):
        pretrain(settings, dataset_id, Path("recipes/baseline/report.toml"))
