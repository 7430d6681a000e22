"""The page of results from a real MLflow."""

import json

import numpy as np
import pytest
from mlflow import MlflowClient

from ml.errors import RegistryUnavailable, StorageError
from ml.evaluation.metrics import evaluate
from ml.evaluation.robustness import Robustness
from ml.registry import tracking
from ml.training.recipe import load_recipe
from ml.workflows.results import results

LABELS = np.arange(100) % 10
METRICS = evaluate(LABELS, np.eye(10)[np.where(np.arange(100) < 90, LABELS, (LABELS + 1) % 10)])
ROBUSTNESS = Robustness(
    n=50,
    mean_accuracy=0.5,
    mean_accuracy_low=0.45,
    mean_accuracy_high=0.55,
    by_corruption={"fog": 0.5},
    cells={("fog", severity): 0.5 for severity in range(1, 6)},
)
EPOCHS = [{"loss": 1.0, "accuracy": 0.7 + epoch / 100, "val_accuracy": 0.6 + epoch / 100} for epoch in range(4)]


@pytest.fixture
def here(settings, mlflow_uri):
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@pytest.fixture
def experiment(request):
    """One of the test's own: in the usual one lie the trainings of other tests."""
    return f"results-{request.node.name}"


def experiments(name):
    return {"experiment": name, "pretraining_experiment": f"{name}-pretraining"}


def train(here, experiment, recipe="report", seed=20, **changes):
    made_by = load_recipe("baseline", recipe)
    tags = {
        "architecture": "baseline", "recipe": recipe, "recipe.digest": made_by.digest, "weights": "from scratch",
        "data": "cifar-10", "dataset_id": "ds-0123456789ab", "keras.backend": "tensorflow",
        "command": f"cifar10 train baseline --recipe {recipe}", "hardware.gpu": "none", **changes,
    }  # fmt: skip
    with tracking.run(here, f"baseline-{recipe}", tags=tags, seed=seed, experiment=experiment) as run:
        run.log_params({"images.train": 45000, "images.test": 100})
        run.log_metrics({"test_accuracy": 0.9 - seed / 1000, "wall_seconds": 61.0, "peak_memory_mib": 2000.0})
        run.log_dict(made_by.model_dump(mode="json"), "recipe.json")
        run.log_dict({"validation": METRICS.as_dict(), "test": METRICS.as_dict()}, "metrics.json")
        run.log_dict(ROBUSTNESS.as_dict(), "robustness.json")
        run.log_dict({"stages": [{"name": "fit", "kept_epoch": 2, "figures": EPOCHS}]}, "history.json")
    return run.id


def test_the_page_says_what_mlflow_holds(here, experiment, tmp_path):
    first, second = train(here, experiment, seed=20), train(here, experiment, seed=21)
    train(here, experiment, "demo")
    again = train(here, experiment, reproduces=first, reproduction="same")
    page = tmp_path / "docs" / "results.md"
    found = results(here, page, **experiments(experiment))
    assert json.loads(json.dumps(found)) == found
    (row,) = found["rows"]
    assert [run["run_id"] for run in row["runs"]] == [second, first]
    assert row["reproductions"] == [{"run_id": again, "result": "same"}]
    assert (row["test"]["accuracy"], row["robustness"]["mean_accuracy"]) == (0.9, 0.5)
    assert row["recipe_is_current"] is True
    assert len(found["missing"]) == 4
    assert [target["verdict"][:7] for target in found["targets"]] == ["not run", "not run"]
    text = page.read_text()
    for words in (
        "| baseline `report` | 83.66 % train, 81.99 % validation | 0.9000 [",
        "(5 cells of 50 images)",
        "| baseline `report` | fit | 3 of 4 | 0.7200 | 0.6200 |",
        "| 2 | 21, 20 | 0.8795 | 0.8790 to 0.8800 |",
        f"- Run: `{second}`",
        "gpu none",
        "- Wall time: 61 s",
        "(train 45000, test 100 images)",
    ):
        assert words in text
    assert results(here, page, **experiments(experiment))["rows"] == found["rows"]
    assert page.read_text() == text


def test_without_runs_there_is_a_page_that_says_so(here, experiment, tmp_path):
    found = results(here, tmp_path / "results.md", **experiments(experiment))
    assert found["rows"] == []
    assert "**not run yet**" in (tmp_path / "results.md").read_text()


def test_a_run_of_another_layout_has_a_row_without_figures(here, experiment, tmp_path):
    run_id = train(here, experiment, **{"recipe.digest": "of a recipe that has changed"})
    client = MlflowClient(here.tracking_uri)
    (tmp_path / "recipe.json").write_text('{"name": "report", "architecture": "baseline", "epochs": 10}')
    client.log_artifact(run_id, str(tmp_path / "recipe.json"))
    (tmp_path / "metrics.json").write_text('{"test": {"accuracy": 0.5}}')
    client.log_artifact(run_id, str(tmp_path / "metrics.json"))
    found = results(here, tmp_path / "results.md", **experiments(experiment))
    assert [(row["test"], row["recipe_is_current"]) for row in found["rows"]] == [(None, False)]


def test_what_cannot_be_asked_or_written_leaves_the_page_as_it_is(settings, here, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("as it was")
    with pytest.raises(RegistryUnavailable):
        results(settings, page)
    assert page.read_text() == "as it was"
    with pytest.raises(StorageError, match="--output"):
        results(here, page / "below-a-file.md")


def test_a_recipe_written_before_a_key_existed_is_still_the_recipe(here, experiment, tmp_path):
    run_id = train(here, experiment, "best", **{"recipe.digest": "before"})
    old = load_recipe("baseline", "best").model_dump(mode="json")
    del old["test_limit"]  # has the value that it has by default
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    MlflowClient(here.tracking_uri).log_artifact(run_id, str(tmp_path / "recipe.json"))
    other = train(here, experiment, "best", seed=21)
    (row,) = results(here, tmp_path / "results.md", **experiments(experiment))["rows"]
    assert row["recipe_is_current"] is True
    assert [run["run_id"] for run in row["runs"]] == [other, run_id]


def test_pretraining_is_read_from_its_own_experiment(here, experiment, tmp_path):
    tags = {"recipe": "vgg16", "data": "cifar-10", "dataset_id": "ds-1", "weights.sha256": "ab" * 32}
    with tracking.run(here, "pretrain", tags=tags, experiment=f"{experiment}-pretraining") as run:
        run.log_metrics({"validation_accuracy": 0.8123})
    found = results(here, tmp_path / "results.md", **experiments(experiment))
    assert found["rows"] == []
    text = (tmp_path / "results.md").read_text()
    assert "| `vgg16` | cifar-10 `ds-1` | – | – | 0.8123 | not recorded | – | `abababababab` |" in text
    assert run.id in text
