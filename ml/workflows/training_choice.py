"""What is trained where the request leaves it open: the newest dataset, the recipe `report`; and by which backend.

Apart from `ml.workflows.train`, so that a bad request is refused without the ten seconds of TensorFlow's import.
"""

import importlib.util
import os
import sys
from typing import Any

from ml.datasets.store import latest_dataset_id, read_manifest
from ml.errors import ConfigurationError
from ml.settings import Settings
from ml.training.recipe import load_recipe

DEFAULT_RECIPE = "report"


def choose(
    settings: Settings, architecture: str, *, dataset_id: str | None = None, recipe: str | None = None
) -> dict[str, str]:
    """Fills in what is None, and sees that what is not can be used.

    Returns:
        {"dataset_id", "recipe"}.

    Raises:
        ConfigurationError: this architecture has no such recipe, or it cannot work.
        DatasetNotFound: there is no such dataset, or none at all.
        DatasetInvalid: its manifest cannot be used.
        StorageError: the datasets cannot be read.
    """
    name = load_recipe(architecture, recipe or DEFAULT_RECIPE).name
    return {"dataset_id": newest(settings, dataset_id), "recipe": name}


def newest(settings: Settings, dataset_id: str | None) -> str:
    """That dataset's id, if it is there; the newest one's where None is asked for.

    Raises:
        DatasetNotFound, DatasetInvalid, StorageError: as `choose`.
    """
    if dataset_id is None:
        return latest_dataset_id(settings.data_url)
    return read_manifest(settings.data_url, dataset_id).dataset_id


def train(settings: Settings, architecture: str, **asked: Any) -> dict[str, object]:
    """`ml.workflows.train.train_by_name`, computed by the backend of the settings.

    Raises:
        ConfigurationError: the backend is not installed, or another one already runs in this process.
        As `ml.workflows.train.train_by_name`.
    """
    use_backend(settings.keras_backend)
    # Only now: it imports Keras, and that takes ten seconds.
    from ml.workflows.train import train_by_name  # noqa: PLC0415

    return train_by_name(settings, architecture, **asked)


def use_backend(name: str) -> None:
    """Makes Keras compute with `tensorflow` or `jax`. Keras asks the environment, once, when it is imported.

    Raises:
        ConfigurationError: Keras is already there with another one; or the one asked for is not installed.
    """
    if "keras" in sys.modules:
        found = sys.modules["keras"].backend.backend()
        if found != name:
            raise ConfigurationError(
                f"KERAS_BACKEND asks for {name}, and this process already computes with {found}.",
                fix="set KERAS_BACKEND before the process starts.",
            )
        return
    if importlib.util.find_spec(name) is None:
        raise ConfigurationError(
            f"KERAS_BACKEND asks for {name}, which is not installed.",
            fix=f"install it (`pip install {name}`, or its build for your accelerator), or take "
            f"{'tensorflow' if name == 'jax' else 'jax'}.",
        )
    os.environ["KERAS_BACKEND"] = name
