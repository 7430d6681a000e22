"""What is trained where the request leaves it open, and which requests are refused before TensorFlow is imported."""

import subprocess
import sys

import pytest

from ml.datasets.store import write_dataset
from ml.datasets.synthetic import generate
from ml.errors import ConfigurationError, DatasetNotFound
from ml.workflows.training_choice import choose


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
