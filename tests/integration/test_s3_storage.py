"""Datasets and MLflow's artifacts on a real S3 server: whole or not at all, seen at once, and outages told as such."""

import gzip
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the S3 server runs on Linux", allow_module_level=True)

from mlflow import MlflowClient
from s3fs import S3FileSystem

from ml.datasets import store
from ml.datasets.drivers import connect
from ml.datasets.explore_page import copy_exploration, write_exploration
from ml.datasets.storage import Storage
from ml.datasets.synthetic import generate
from ml.errors import ConfigurationError, DatasetNotFound, StorageError
from ml.workflows.ingest import export_csv, ingest
from tests.conftest import free_port, mlflow_server
from tests.s3_process import S3Process

RAW = generate(200, 50)
BUCKET = "cifar10-data"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = S3Process(tmp_path_factory.mktemp("s3") / "data")
    server.client().create_bucket(Bucket=BUCKET)
    yield server
    server.stop()


@pytest.fixture
def tell(server, monkeypatch):
    """Sets what the driver is told of the server; it reads that when it is made."""

    def setenv(**changes):
        for name, value in (server.environment() | changes).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()

    setenv()
    return setenv


@pytest.fixture
def url(tell):
    """A place of the test's own."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def left(server, url):
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    return [name.removeprefix(f"{prefix}/") for name in server.names(BUCKET) if name.startswith(prefix)]


def test_a_dataset_is_written_once_and_read_by_all_who_use_it(settings, server, url, tmp_path):
    settings = settings.model_copy(update={"mlops_data_url": url})
    result = ingest(settings)
    dataset_id = str(result["dataset_id"])
    assert result["created"] is True
    assert result["url"] == f"{url}/datasets/{dataset_id}"
    names = left(server, url)
    assert ingest(settings) == {**result, "created": False}
    assert left(server, url) == names, "a second ingestion writes nothing"

    local = store.write_dataset(generate(), str(tmp_path / "disk"))
    assert local.dataset_id == dataset_id
    for split in ("train", "validation", "test"):
        here, there = (store.load_split(place, dataset_id, split) for place in (str(tmp_path / "disk"), url))
        np.testing.assert_array_equal(here.images, there.images)
        assert here.ids == there.ids
    assert len(store.load_split(url, dataset_id, "train", limit=30).ids) == 30

    exported = export_csv(settings, dataset_id)
    assert (exported["created"], export_csv(settings, dataset_id)["created"]) == (True, False)
    text = gzip.decompress(Storage(url).read(f"datasets/{dataset_id}/csv/test.csv.gz")).decode()
    assert len(text.splitlines()) == 1 + exported["rows"]["test"]
    target, created = write_exploration(url, dataset_id)
    assert (created, write_exploration(url, dataset_id)) == (True, (target, False))
    copy_exploration(url, dataset_id, tmp_path)
    assert "</html>" in (tmp_path / "index.html").read_text()
    assert [name for name in left(server, url) if "staging" in name] == []


def test_what_others_commit_and_delete_is_seen_at_once(server, url):
    s3, root = server.client(), url.removeprefix(f"s3://{BUCKET}/")
    assert store.list_datasets(url) == []
    with pytest.raises(DatasetNotFound):
        store.latest_dataset_id(url)
    first = store.write_dataset(RAW, url).dataset_id
    assert Storage(url).committed_folders("datasets") == [first]
    # Another process copies it under another name, and deletes it.
    for name in ("train.parquet", "manifest.json"):
        source = f"{root}/datasets/{first}/{name}"
        s3.copy_object(Bucket=BUCKET, Key=f"{root}/datasets/other/{name}", CopySource=f"{BUCKET}/{source}")
    assert Storage(url).committed_folders("datasets") == sorted([first, "other"])
    s3.delete_object(Bucket=BUCKET, Key=f"{root}/datasets/{first}/manifest.json")
    assert Storage(url).committed_folders("datasets") == ["other"]
    with pytest.raises(DatasetNotFound):
        store.load_split(url, first, "train")
    assert store.commit(store.prepare(RAW), url)[1], "it is written anew"


KILLED = """
import os, signal, sys
from s3fs import S3FileSystem
from ml.datasets import store
from ml.datasets.synthetic import generate

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

copy = S3FileSystem._cp_file

async def copy_or_die(self, source, target, **more):
    if target.endswith(sys.argv[3]):
        die()
    await copy(self, source, target, **more)

if sys.argv[2] == "while it writes":
    store._describe = die
else:
    S3FileSystem._cp_file = copy_or_die
store.write_dataset(generate(200, 50), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("moment", "at"),
    [("while it writes", ""), ("while it copies", "train.parquet"), ("before the end", "manifest.json")],
)
def test_what_a_killed_writer_leaves_is_invisible(moment, at, server, url):
    ended = subprocess.run([sys.executable, "-c", KILLED, url, moment, at], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert left(server, url), "it was killed before it wrote"
    assert store.list_datasets(url) == []
    manifest, created = store.commit(store.prepare(RAW), url)
    assert created
    assert [each.dataset_id for each in store.list_datasets(url)] == [manifest.dataset_id]
    store.load_split(url, manifest.dataset_id, "train")


def test_who_is_interrupted_leaves_nothing(server, url, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(store, "_describe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.write_dataset(RAW, url)
    assert left(server, url) == []


def test_of_a_file_that_is_broken_off_nothing_is_stored(server, url):
    driver = connect(url)
    with pytest.raises(RuntimeError), driver.writing(f"{driver.root}/file") as file:  # noqa: PT012
        for _ in range(60):
            file.write(bytes(2**20))
        raise RuntimeError
    assert left(server, url) == []
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=BUCKET), "parts that nobody would delete"


def test_writers_at_once_write_one_dataset(server, url):
    prepared, results = store.prepare(RAW), []
    start = threading.Barrier(4)

    def write():
        start.wait()
        results.append(store.commit(prepared, url)[0].dataset_id)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [prepared.dataset_id] * 4
    folder = f"datasets/{prepared.dataset_id}"
    assert left(server, url) == [
        f"{folder}/{name}" for name in ("manifest.json", "test.parquet", "train.parquet", "validation.parquet")
    ]
    store.load_split(url, prepared.dataset_id, "train")


@pytest.mark.parametrize(
    ("wrong", "said", "fix"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "Check your key|Forbidden", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, "Could not connect", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_store_that_cannot_be_asked_is_no_empty_store(wrong, said, fix, url, tell):
    dataset_id = store.write_dataset(RAW, url).dataset_id
    tell(**wrong)
    for ask in (
        lambda: store.latest_dataset_id(url),
        lambda: store.load_split(url, dataset_id, "test"),
        lambda: store.write_dataset(RAW, url),
    ):
        with pytest.raises(StorageError, match=said) as error:
            ask()
        assert fix in error.value.fix
    tell()
    assert store.latest_dataset_id(url) == dataset_id


def test_a_missing_bucket_is_neither_empty_nor_made(server, tell):
    url = "s3://mistyped-bucket/data"
    for ask in (lambda: store.latest_dataset_id(url), lambda: store.write_dataset(RAW, url)):
        with pytest.raises(StorageError, match="bucket does not exist") as error:
            ask()
        assert "make the bucket" in error.value.fix
    with pytest.raises(FileNotFoundError), connect(url).writing("mistyped-bucket/data/file") as file:
        file.write(b"1")
    assert [bucket["Name"] for bucket in server.client().list_buckets()["Buckets"]] == [BUCKET]


def test_an_address_without_its_scheme_is_named(tell):
    tell(AWS_ENDPOINT_URL="s3:9000")
    with pytest.raises(ConfigurationError, match="Invalid endpoint: s3:9000") as error:
        store.list_datasets(f"s3://{BUCKET}")
    assert "AWS_ENDPOINT_URL" in error.value.fix


def test_a_server_that_goes_away_meanwhile(server, url, monkeypatch):
    with monkeypatch.context() as outage:
        describe = store._describe
        outage.setattr(store, "_describe", lambda *given: server.stop(signal.SIGKILL) or describe(*given))
        with pytest.raises(StorageError, match=r"could not be written: .*onnect"):
            store.write_dataset(RAW, url)
    server.start()
    assert store.list_datasets(url) == []
    dataset_id = store.write_dataset(RAW, url).dataset_id
    store.load_split(url, dataset_id, "train")


def test_mlflow_keeps_its_artifacts_there(server, postgres, tmp_path):
    bucket = f"artifacts-{secrets.token_hex(4)}"
    server.client().create_bucket(Bucket=bucket)
    content = os.urandom(20 * 2**20)  # of two parts and more, as a model is
    (tmp_path / "model.bin").write_bytes(content)
    database = postgres.new_database(f"mlflow_{secrets.token_hex(4)}")
    with mlflow_server(database, f"s3://{bucket}", tmp_path / "mlflow.log", server.environment()) as uri:
        client = MlflowClient(uri)
        run_id = client.create_run("0").info.run_id
        client.log_artifact(run_id, str(tmp_path / "model.bin"), "model")
        assert server.names(bucket) == [f"0/{run_id}/artifacts/model/model.bin"]
        assert [file.path for file in client.list_artifacts(run_id, "model")] == ["model/model.bin"]
        (tmp_path / "back").mkdir()
        back = client.download_artifacts(run_id, "model/model.bin", str(tmp_path / "back"))
    assert Path(back).read_bytes() == content
