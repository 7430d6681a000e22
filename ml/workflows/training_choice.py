"""What is trained where the request leaves it open: the newest dataset, the recipe `report`.

Apart from `ml.workflows.train`, so that a bad request is refused without the ten seconds of TensorFlow's import.
"""

from ml.datasets.store import latest_dataset_id, read_manifest
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
    if dataset_id is None:
        return {"dataset_id": latest_dataset_id(settings.data_url), "recipe": name}
    return {"dataset_id": read_manifest(settings.data_url, dataset_id).dataset_id, "recipe": name}
