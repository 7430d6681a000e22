"""A search against a real MLflow: parent and child runs, pruning, failures, what is left, and going on after a kill."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ml.datasets import store, synthetic
from ml.datasets.manifest import Manifest
from ml.errors import (
    ConfigurationError,
    DatasetNotFound,
    RegistryUnavailable,
    TrainingDiverged,
    TrainingError,
)
from ml.registry.versions import Registry
from ml.settings import Settings
from ml.toml_files import read_toml
from ml.training.recipe import Recipe, parse_recipe
from ml.training.sweep_space import Sweep
from ml.workflows.sweep import Fit, MakeFit, OnEpoch, sweep

RECIPE = """
name = "tiny"
architecture = "baseline"
seed = 3
batch_size = 32
train_limit = 300
validation_limit = 60

[model]
filters = [4]
dense_units = 8
batch_norm_momentum = 0.5

[[stages]]
name = "first"
epochs = 2
learning_rate = 0.01

[[stages]]
name = "second"
epochs = 2
learning_rate = 0.005

[sweep]
trials = 5
seed = 3
random_trials = 2

[sweep.pruner]
startup_trials = 1
warmup_epochs = 1

[sweep.space]
"stages.first.learning_rate" = { low = 0.001, high = 0.02, log = true }
"model.filters" = { choices = [[4], [4, 8]] }
"""
RATE = "stages.first.learning_rate"


@pytest.fixture
def ready(settings: Settings, mlflow_uri: str) -> tuple[Settings, str]:
    """Settings with a real MLflow, and the id of a stored SYNTHETIC dataset."""
    settings = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    manifest = store.write_dataset(synthetic.generate(train=1000, test=100, seed=4), settings.data_url)
    return settings, manifest.dataset_id


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def acting(accuracies: Mapping[int, float], before: Callable[[int, str, int], None] | None = None) -> MakeFit:
    """Trials that reach these accuracies, by their order; `before` is told trial, stage and epoch before each epoch."""
    tried: list[int] = []

    def make_fit(settings: Settings, manifest: Manifest, asked: Sweep) -> tuple[Fit, str]:
        def fit(recipe: Recipe, on_epoch: OnEpoch) -> None:
            number = len(tried)
            tried.append(number)
            for stage in recipe.stages:
                for epoch in range(stage.epochs):
                    if before is not None:
                        before(number, stage.name, epoch)
                    reached = accuracies.get(number, 0.5) - 0.1 * (stage.epochs - 1 - epoch)
                    on_epoch(stage.name, epoch, {"loss": 1.0, "val_loss": 1.0, "val_accuracy": reached})

        return fit, "from scratch"

    return make_fit


def children(client: MlflowClient, run_id: str) -> list[Run]:
    """By their trial's number."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    return sorted(found, key=lambda run: int(run.data.tags["sweep.trial"]))


def artifact(client: MlflowClient, run_id: str, name: str, folder: Path) -> Path:
    return Path(client.download_artifacts(run_id, name, str(folder)))


def test_a_search_is_a_run_with_a_child_for_each_trial(ready: tuple[Settings, str], file: Path, tmp_path: Path) -> None:
    settings, dataset_id = ready
    client = MlflowClient(settings.tracking_uri)
    versions = len(Registry(settings.tracking_uri).versions())

    def diverging(number: int, stage: str, epoch: int) -> None:
        if (number, stage) == (2, "second"):
            raise TrainingDiverged("The loss became nan.", fix="lower the rate.")

    play = acting({0: 0.5, 1: 0.3, 3: 0.7, 4: 0.6}, diverging)
    result = sweep(settings, file, dataset_id=dataset_id, make_fit=play)
    assert json.loads(json.dumps(result)) == result
    counts = {key: result[key] for key in ("trials", "complete", "pruned", "failed", "interrupted")}
    assert counts == {"trials": 5, "complete": 3, "pruned": 1, "failed": 1, "interrupted": 0}
    assert (result["best"]["trial"], result["best"]["value"]) == (3, pytest.approx(0.7))
    assert set(result["best"]["overrides"]) == {RATE, "model.filters"}

    parent = client.get_run(result["run_id"])
    assert client.get_experiment(parent.info.experiment_id).name == "cifar10-sweeps"
    assert (parent.info.run_name, parent.info.status) == ("sweep-tiny", "FINISHED")
    assert parent.data.params[RATE] == "0.01"
    assert json.loads(parent.data.params[f"space.{RATE}"])["high"] == 0.02
    assert (parent.data.tags["dataset_id"], parent.data.tags["data"]) == (dataset_id, "SYNTHETIC")
    assert parent.data.tags["weights"] == "from scratch"
    assert parent.data.tags["command"] == f"cifar10 sweep {file} --dataset {dataset_id}"
    best = client.get_metric_history(parent.info.run_id, "best_validation_accuracy")
    assert [(point.step, point.value) for point in sorted(best, key=lambda point: point.step)] == [
        *((step, pytest.approx(0.5)) for step in range(3)),
        *((step, pytest.approx(0.7)) for step in (3, 4)),
    ]

    runs = children(client, parent.info.run_id)
    assert [run.data.tags["sweep.state"] for run in runs] == ["complete", "pruned", "failed", "complete", "complete"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert [run.data.tags.get("pruned") for run in runs] == [None, "true", None, None, None]
    assert "became nan" in runs[2].data.tags["error"]
    # The recipe as it stands is the first trial; the others differ, and say in what.
    assert (runs[0].data.params[RATE], runs[0].data.params["model.filters"]) == ("0.01", "[4]")
    assert len({run.data.params[RATE] for run in runs}) == 5
    assert runs[3].data.params[RATE] == str(result["best"]["overrides"][RATE])
    steps = client.get_metric_history(runs[0].info.run_id, "validation_accuracy")
    assert [point.step for point in steps] == [0, 1, 2, 3]
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "second/val_loss")] == [0, 1]
    # Given up after the warm-up epoch, in the first of two stages.
    assert [point.step for point in client.get_metric_history(runs[1].info.run_id, "validation_accuracy")] == [0, 1]

    assert_best_recipe_and_table(settings, client, result, file, tmp_path)
    assert len(Registry(settings.tracking_uri).versions()) == versions


def assert_best_recipe_and_table(
    settings: Settings, client: MlflowClient, result: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    """The best recipe is a whole recipe's file, here and in MLflow, and the table has a row for each trial."""
    run_id = result["run_id"]
    path = Path(result["recipe_path"])
    assert path.is_relative_to(settings.mlops_var_dir / "sweeps" / result["study"])
    recipe = parse_recipe(read_toml(path), origin=str(path))
    assert recipe.name == path.stem == "tiny-best"
    base = {key: value for key, value in read_toml(file).items() if key != "sweep"}
    expected = parse_recipe(base, origin="base").with_overrides({**result["best"]["overrides"], "name": "tiny-best"})
    assert recipe == expected
    uploaded = artifact(client, run_id, "best/tiny-best.toml", tmp_path)
    assert uploaded.read_bytes() == path.read_bytes()
    plain = json.loads(artifact(client, run_id, "recipe.json", tmp_path).read_text())
    assert parse_recipe(plain, origin="json") == recipe
    table = artifact(client, run_id, "trials.csv", tmp_path).read_text()
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["state"] for row in rows] == ["complete", "pruned", "failed", "complete", "complete"]
    assert [row["run_id"] for row in rows] == [run.info.run_id for run in children(client, run_id)]
    assert "became nan" in rows[2]["error"]


def test_a_search_that_is_done_is_not_done_again_and_can_be_prolonged(ready: tuple[Settings, str], file: Path) -> None:
    settings, dataset_id = ready
    client = MlflowClient(settings.tracking_uri)
    first = sweep(settings, file, dataset_id=dataset_id, trials=2, make_fit=acting({}))
    Path(first["recipe_path"]).unlink()
    refuse: MakeFit = lambda *_: pytest.fail("it trained")  # noqa: E731
    assert sweep(settings, file, trials=2, make_fit=refuse) == first
    assert Path(first["recipe_path"]).exists()
    more = sweep(settings, file, trials=4, make_fit=acting({0: 0.9}))
    assert (more["study"], more["trials"], more["best"]["trial"]) == (first["study"], 4, 2)
    assert client.get_run(more["run_id"]).data.tags["sweep.prolongs"] == first["run_id"]
    assert [len(children(client, result["run_id"])) for result in (first, more)] == [2, 2]


KILLED = """
import os, signal, sys
from pathlib import Path
from ml.settings import Settings
from ml.workflows.sweep import sweep
from tests.integration.test_sweep import acting

def kill(number, stage, epoch):
    if (number, stage, epoch) == (2, "first", 1):
        os.kill(os.getpid(), signal.SIGKILL)

settings = Settings.model_validate_json(sys.argv[1])
sweep(settings, Path(sys.argv[2]), trials=4, make_fit=acting({0: 0.5, 1: 0.8}, kill))
"""


def test_a_killed_search_goes_on_in_the_same_run(ready: tuple[Settings, str], file: Path) -> None:
    settings, _ = ready
    client = MlflowClient(settings.tracking_uri)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, settings.model_dump_json(), str(file)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = sweep(settings, file, trials=4, make_fit=acting({0: 0.6, 1: 0.7}))
    assert (result["trials"], result["interrupted"], result["best"]["trial"]) == (4, 1, 1)
    runs = children(client, result["run_id"])
    assert [run.data.tags.get("sweep.state") for run in runs][:3] == ["complete", "complete", None]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED", "KILLED", "FINISHED", "FINISHED"]
    parent = client.get_run(result["run_id"])
    assert (parent.info.status, parent.data.tags["resumed"]) == ("FINISHED", "1")


def test_a_registry_that_goes_away_ends_the_search_which_then_goes_on(ready: tuple[Settings, str], file: Path) -> None:
    settings, _ = ready

    def leaving(number: int, stage: str, epoch: int) -> None:
        if number == 1:
            raise RegistryUnavailable("MLflow is away.", fix="start it.")

    with pytest.raises(RegistryUnavailable):
        sweep(settings, file, trials=3, make_fit=acting({}, leaving))
    result = sweep(settings, file, trials=3, make_fit=acting({}))
    assert (result["trials"], result["interrupted"]) == (3, 1)
    client = MlflowClient(settings.tracking_uri)
    assert [run.info.status for run in children(client, result["run_id"])][:2] == ["FINISHED", "FAILED"]


def test_a_search_without_one_completed_trial_is_an_error(ready: tuple[Settings, str], file: Path) -> None:
    settings, _ = ready

    def diverging(number: int, stage: str, epoch: int) -> None:
        raise TrainingDiverged("The loss became nan.", fix="lower the rate.")

    with pytest.raises(TrainingError, match=r"Not one trial .* became nan"):
        sweep(settings, file, trials=2, make_fit=acting({}, diverging))


def test_what_cannot_work_is_said_before_anything_is_trained(ready: tuple[Settings, str], file: Path) -> None:
    settings, dataset_id = ready
    refuse: MakeFit = lambda *_: pytest.fail("it trained")  # noqa: E731
    with pytest.raises(DatasetNotFound):
        sweep(settings, file, dataset_id="ds-000000000000", make_fit=refuse)
    written = file.read_text()
    file.write_text(RECIPE.replace("train_limit = 300", "") + '"batch_size" = { low = 32, high = 4096 }\n')
    with pytest.raises(ConfigurationError, match="batches of 4096"):
        sweep(settings, file, make_fit=refuse)
    assert not (settings.mlops_var_dir / "sweeps").exists()
    file.write_text(written)
    away = settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(RegistryUnavailable):
        sweep(away, file, dataset_id=dataset_id, make_fit=refuse)


def test_trials_that_started_from_other_weights_are_not_mixed(ready: tuple[Settings, str], file: Path) -> None:
    settings, _ = ready
    sweep(settings, file, trials=1, make_fit=acting({}))
    with pytest.raises(ConfigurationError, match="began with from scratch, and now VGG16_WEIGHTS gives imagenet"):
        sweep(settings, file, trials=2, make_fit=lambda *given: (acting({})(*given)[0], "imagenet"))


def test_a_real_search_trains_on_the_validation_split_alone(
    ready: tuple[Settings, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, dataset_id = ready
    asked: list[tuple[str, int | None]] = []
    load = store.load_split

    def loading(data_url: str, dataset_id: str, split: str, limit: int | None = None) -> object:
        asked.append((split, limit))
        return load(data_url, dataset_id, split, limit)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "load_split", loading)
    result = sweep(settings, file, dataset_id=dataset_id, trials=3)
    assert asked == [("train", 300), ("validation", 60)]
    assert result["trials"] == result["complete"] + result["pruned"] == 3
    client = MlflowClient(settings.tracking_uri)
    first = children(client, result["run_id"])[0]
    figures = client.get_metric_history(first.info.run_id, "validation_accuracy")
    last = max(point.value for point in figures if point.step >= 2)
    assert first.data.metrics["best_validation_accuracy"] == pytest.approx(last)
    assert 0 <= result["best"]["value"] <= 1
