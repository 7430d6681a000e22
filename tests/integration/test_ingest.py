"""The ingestion steps as the command line and Airflow call them, with MLflow behind the exploration.

On the real archive where CIFAR10_SOURCE names it, and on the stand-in otherwise.
"""

import json
import os
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ml.datasets.labels import NUM_CLASSES
from ml.datasets.store import latest_dataset_id, load_split, read_manifest
from ml.errors import DatasetNotFound, RegistryUnavailable, SourceNotFound
from ml.settings import Settings
from ml.workflows.ingest import explore, export_csv, ingest

SOURCE = os.environ.get("CIFAR10_SOURCE", "synthetic")


@pytest.fixture
def real_or_stand_in(settings: Settings) -> Settings:
    return settings.model_copy(update={"cifar10_source": SOURCE, "mlops_allow_stand_in": True})


def test_ingest_stores_once_what_the_source_holds(real_or_stand_in: Settings) -> None:
    settings = real_or_stand_in
    result = ingest(settings)
    assert json.loads(json.dumps(result)) == result, "it is handed on as JSON"
    dataset_id = str(result["dataset_id"])
    assert result["created"] is True
    manifest = read_manifest(settings.data_url, dataset_id)
    expected = {"cifar-10": (50_000, 10_000), "SYNTHETIC": (6_000, 1_000)}[manifest.data]
    dropped = manifest.dropped.duplicates + manifest.dropped.overlaps + manifest.dropped.conflicts
    assert manifest.counts["train"] + manifest.counts["validation"] + dropped == expected[0]
    assert manifest.counts["test"] == expected[1]
    assert result["counts"] == manifest.counts
    assert latest_dataset_id(settings.data_url) == dataset_id

    again = ingest(settings)
    assert again == {**result, "created": False}

    test = load_split(settings.data_url, dataset_id, "test")
    assert test.images.shape == (expected[1], 32, 32, 3)
    assert set(test.labels.tolist()) == set(range(NUM_CLASSES))
    # Any leak from one split into another would show as an id in two of them.
    ids = [set(load_split(settings.data_url, dataset_id, name).ids) for name in ("train", "validation")]
    assert not ids[0] & ids[1]
    assert not (ids[0] | ids[1]) & set(test.ids)


def test_a_named_source_goes_before_the_setting(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"none\.tar\.gz"):
        ingest(settings, str(tmp_path / "none.tar.gz"))
    assert not Path(settings.mlops_var_dir / "data").exists()


def test_csv_is_a_step_of_its_own(settings: Settings) -> None:
    dataset_id = str(ingest(settings)["dataset_id"])
    result = export_csv(settings, dataset_id)
    assert json.loads(json.dumps(result)) == result
    assert result["rows"] == read_manifest(settings.data_url, dataset_id).counts
    files = result["files"]
    assert isinstance(files, dict)
    assert all(Path(url.removeprefix("file://")).is_file() for url in files.values())
    assert export_csv(settings, dataset_id) == {**result, "created": False}
    with pytest.raises(DatasetNotFound):
        export_csv(settings, "ds-000000000000")


def test_the_exploration_is_stored_and_logged_to_mlflow(settings: Settings, mlflow_uri: str) -> None:
    dataset_id = str(ingest(settings)["dataset_id"])
    with pytest.raises(RegistryUnavailable):
        explore(settings, dataset_id)  # these settings name an address where nobody answers
    settings = settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})
    result = explore(settings, dataset_id)
    page = Path(str(result["page"]).removeprefix("file://")).read_text("utf-8")
    assert "SYNTHETIC" in page
    client = MlflowClient(mlflow_uri)
    run = client.get_run(str(result["run_id"]))
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset_id"] == dataset_id
    assert run.data.params["data"] == "SYNTHETIC"

    def artifacts(path: str | None = None) -> list[str]:
        found = []
        for entry in client.list_artifacts(run.info.run_id, path):
            found += artifacts(entry.path) if entry.is_dir else [entry.path.rpartition("/")[2]]
        return found

    assert sorted(artifacts()) == [
        "channel_histograms.png", "class_distribution.png", "index.html", "mean_images.png", "preview_grid.png",
    ]  # fmt: skip
