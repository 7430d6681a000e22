"""What is trained where the request leaves it open, and which requests are refused before TensorFlow is imported."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ml.datasets.store import write_dataset
from ml.datasets.synthetic import generate
from ml.errors import ConfigurationError, DatasetNotFound
from ml.workflows.training_choice import choose, train, use_backend


def test_what_is_left_open_is_the_newest_dataset_and_the_report_recipe(settings):
    with pytest.raises(DatasetNotFound, match="No dataset lies under"):
        choose(settings, "baseline")
    older, newer = (
        write_dataset(generate(train=300, test=40, seed=seed), settings.data_url).dataset_id for seed in (1, 2)
    )
    assert choose(settings, "baseline") == {"dataset_id": newer, "recipe": "report"}
    assert choose(settings, "vgg16", dataset_id=older, recipe="demo") == {"dataset_id": older, "recipe": "demo"}


def test_what_is_not_there_is_refused(settings):
    with pytest.raises(ConfigurationError, match="no recipe 'demmo' for baseline"):
        choose(settings, "baseline", recipe="demmo")
    with pytest.raises(DatasetNotFound, match="ds-000000000000"):
        choose(settings, "baseline", dataset_id="ds-000000000000")


def test_choosing_imports_no_tensorflow():
    code = "import sys, ml.workflows.training_choice; print({'tensorflow', 'keras', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture
def without_keras(monkeypatch):
    """As in a process that has not imported it, whatever other tests did in this one."""
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setenv("KERAS_BACKEND", "unset")


def as_if_running(monkeypatch, name):
    backend = SimpleNamespace(backend=lambda: name)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(backend=backend))


def test_the_backend_is_chosen_before_keras_is_imported(without_keras, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or "it is there")
    use_backend("jax")
    assert (os.environ["KERAS_BACKEND"], asked) == ("jax", ["jax"])
    assert "keras" not in sys.modules


def test_a_backend_that_is_not_installed_is_refused(without_keras, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="asks for jax, which is not installed") as told:
        use_backend("jax")
    assert "tensorflow" in told.value.fix
    assert os.environ["KERAS_BACKEND"] == "unset"


def test_a_backend_that_runs_already_cannot_be_changed(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "unset")
    as_if_running(monkeypatch, "tensorflow")
    use_backend("tensorflow")
    with pytest.raises(ConfigurationError, match="asks for jax, and this process already computes with tensorflow"):
        use_backend("jax")
    assert os.environ["KERAS_BACKEND"] == "unset"


def test_training_sets_the_backend_of_the_settings_first(settings, monkeypatch):
    calls = []
    as_if_running(monkeypatch, "tensorflow")

    def train_by_name(given, architecture, **asked):
        calls.append((given, architecture, asked))
        return {"version": 1}

    monkeypatch.setitem(sys.modules, "ml.workflows.train", SimpleNamespace(train_by_name=train_by_name))
    assert train(settings, "baseline", dataset_id="ds-0", recipe="demo", resume="if there") == {"version": 1}
    assert calls == [(settings, "baseline", {"dataset_id": "ds-0", "recipe": "demo", "resume": "if there"})]
    with pytest.raises(ConfigurationError, match="asks for jax"):
        train(settings.model_copy(update={"keras_backend": "jax"}), "baseline")
    assert len(calls) == 1
