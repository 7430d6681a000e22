"""Reproductions against a real MLflow; the training is played by a function that leaves a run behind."""

import json
from dataclasses import dataclass

import pytest
from mlflow import MlflowClient

from ml.errors import (
    ConfigurationError,
    DatasetNotFound,
    NotReproduced,
    RegistryError,
    RegistryUnavailable,
    RunNotFound,
)
from ml.registry import tracking
from ml.training.recipe import load_recipe
from ml.workflows.reproduce import original, reproduce
from tests.tiny_versions import small_dataset


@pytest.fixture
def here(settings, mlflow_uri):
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@pytest.fixture
def client(mlflow_uri):
    return MlflowClient(mlflow_uri)


@dataclass(frozen=True)
class Weights:
    """Stands for ml.models.vgg16_weights.Weights."""

    sha256: str | None
    label: str


def no_weights(setting, allow_stand_in, cache_dir):
    pytest.fail("weights were asked for")


class Training:
    """Stands for ml.workflows.train.train: leaves a run with the figures that it is told to have."""

    def __init__(self, losses=(2.0, 1.0), accuracy=0.5, weights="from scratch", sha256="none"):
        self.losses, self.accuracy = losses, accuracy
        self.tags = {"weights": weights, "weights.sha256": sha256}
        self.calls = []

    def __call__(self, settings, architecture, dataset_id, recipe, *, resume="no", tags=None, register=True):
        self.calls.append((architecture, dataset_id, recipe, tags, register))
        self.resumed = resume
        named = {"architecture": architecture, "recipe": recipe.name, "dataset_id": dataset_id}
        with tracking.run(settings, "trained", tags={**named, **self.tags, **(tags or {})}, seed=recipe.seed) as run:
            run.log_dict(recipe.model_dump(mode="json"), "recipe.json")
            for epoch, loss in enumerate(self.losses):
                run.log_metrics({"fit/loss": loss, "fit/images_per_second": 10.0 * len(self.calls)}, step=epoch)
            run.log_metrics({"test_accuracy": self.accuracy, "wall_seconds": 3.0 * len(self.calls)})
        return {"run_id": run.id}


def first_run(here, training, architecture="baseline"):
    """Trained once, as `cifar10 train` would: its id."""
    recipe = load_recipe(architecture, "demo")
    return training(here, architecture, small_dataset(here).dataset_id, recipe)["run_id"]


def test_a_run_that_comes_out_the_same_is_reproduced(here, client):
    training = Training()
    run_id = first_run(here, training)
    client.set_tag(run_id, "version.numpy", "1.0")
    found = reproduce(here, original(here, run_id), train=training, resolve_weights=no_weights)
    assert json.loads(json.dumps(found)) == found
    assert (found["same"], found["run_id"], found["differences"], found["compared"]) == (True, run_id, [], 3)
    assert [item["what"] for item in found["environment"]] == ["version.numpy"]
    again = client.get_run(found["reproduction_run_id"])
    assert again.info.run_id != run_id
    assert (again.data.tags["reproduces"], again.data.tags["reproduction"]) == (run_id, "same")
    first, second = training.calls
    assert second[:3] == first[:3]
    assert second[3:] == ({"reproduces": run_id}, False)  # nothing is registered
    assert training.resumed == "no"
    reproduce(here, original(here, run_id), train=training, resolve_weights=no_weights, resume=True)
    assert training.resumed == "required"


def test_a_run_that_comes_out_otherwise_is_told_with_its_first_differences(here, client):
    run_id = first_run(here, Training())
    other = Training(losses=(2.0, 1.25), accuracy=0.75)
    with pytest.raises(NotReproduced, match=r"fit/loss, epoch 1 was 1\.0 and is 1\.25; test_accuracy was 0\.5") as told:
        reproduce(here, original(here, run_id), train=other, resolve_weights=no_weights)
    assert "the first epoch that differs" in told.value.fix
    (again,) = client.search_runs(
        [client.get_experiment_by_name("cifar10").experiment_id], f"tags.reproduces = '{run_id}'"
    )
    assert again.data.tags["reproduction"] == "differs"
    # On another machine, that is the first suspicion.
    client.set_tag(run_id, "hardware.cpu", "another processor")
    with pytest.raises(NotReproduced) as told:
        reproduce(here, original(here, run_id), train=other, resolve_weights=no_weights)
    assert "hardware.cpu (another processor, now" in told.value.fix


def test_many_differences_are_counted(here):
    run_id = first_run(here, Training(losses=range(1, 20)))
    with pytest.raises(NotReproduced, match="; and 14 more"):
        reproduce(
            here,
            original(here, run_id),
            train=Training(losses=[0.5] * 19),
            resolve_weights=no_weights,
        )


@pytest.mark.parametrize(
    ("was", "now", "fix"),
    [
        (("imagenet", "a" * 64), Weights(None, "RANDOM WEIGHTS"), "VGG16_WEIGHTS=imagenet"),
        (("RANDOM WEIGHTS", "none"), Weights("a" * 64, "imagenet"), "VGG16_WEIGHTS=random"),
        (("file sha256:bbb", "b" * 64), Weights("a" * 64, "imagenet"), "b" * 64),
    ],
)
def test_other_weights_are_refused_before_anything_is_trained(here, was, now, fix):
    training = Training(weights=was[0], sha256=was[1])
    run_id = first_run(here, training, "vgg16")
    with pytest.raises(ConfigurationError, match="VGG16_WEIGHTS now names") as told:
        reproduce(here, original(here, run_id), train=training, resolve_weights=lambda *asked: now)
    assert fix in told.value.fix
    assert len(training.calls) == 1


def test_the_same_weights_are_taken(here):
    training = Training(weights="imagenet", sha256="a" * 64)
    asked = []

    def resolve(*settings):
        asked.append(settings)
        return Weights("a" * 64, "imagenet")

    run_id = first_run(here, training, "vgg16")
    assert reproduce(here, original(here, run_id), train=training, resolve_weights=resolve)["same"]
    assert asked == [(here.vgg16_weights, here.mlops_allow_stand_in, here.cache_dir)]


def test_what_cannot_be_trained_again_is_refused_at_once(here, client, settings):
    with pytest.raises(RunNotFound):
        original(here, "0" * 32)
    run_id = first_run(here, Training())
    with pytest.raises(RegistryUnavailable):
        original(settings, run_id)
    client.set_tag(run_id, "dataset_id", "ds-000000000000")
    with pytest.raises(DatasetNotFound):
        original(here, run_id)
    client.delete_tag(run_id, "dataset_id")
    with pytest.raises(RegistryError, match="lacks the tag dataset_id"):
        original(here, run_id)
    client.set_terminated(run_id, "FAILED")
    with pytest.raises(RegistryError, match="is FAILED"):
        original(here, run_id)
    with tracking.run(here, "bare", tags={"architecture": "baseline", "dataset_id": "ds-1"}) as bare:
        pass
    with pytest.raises(RegistryError, match=r"lacks the file recipe\.json"):
        original(here, bare.id)
    with tracking.run(here, "old", tags={"architecture": "baseline", "dataset_id": "ds-1"}) as old:
        old.log_dict({"name": "old", "architecture": "baseline", "epochs": 3}, "recipe.json")
    with pytest.raises(ConfigurationError, match=f"recipe.json of run {old.id}"):
        original(here, old.id)


def test_a_real_training_comes_out_the_same_digit_for_digit(here, client):
    from ml.models.vgg16_weights import resolve_weights
    from ml.workflows.train import train

    small = {
        "stages.fit.epochs": 2, "train_limit": 300, "validation_limit": 60, "test_limit": 80,
        "model.filters": [8], "augmentation.flip": True, "augmentation.shift": 2, "corrupted_limit": 10,
    }  # fmt: skip
    recipe = load_recipe("baseline", "demo").with_overrides(small)
    dataset_id = small_dataset(here, train=1000, test=100).dataset_id
    run_id = str(train(here, "baseline", dataset_id, recipe)["run_id"])
    versions = len(client.search_model_versions(f"run_id = '{run_id}'"))
    found = reproduce(here, original(here, run_id), train=train, resolve_weights=resolve_weights)
    assert (found["same"], found["environment"]) == (True, [])
    assert found["compared"] > 20
    assert versions == 1
    assert not client.search_model_versions(f"run_id = '{found['reproduction_run_id']}'")
