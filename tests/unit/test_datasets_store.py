"""Datasets appear whole or not at all, are written once, and come back as they were."""

import errno
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ml.datasets.raw import RawDataset
from ml.datasets.splits import SPLIT_NAMES, content_ids
from ml.datasets.storage import MARKER, Storage
from ml.datasets.store import (
    commit,
    latest_dataset_id,
    list_datasets,
    load_split,
    prepare,
    read_manifest,
    write_dataset,
)
from ml.datasets.synthetic import generate
from ml.errors import ConfigurationError, DatasetInvalid, DatasetNotFound, StorageError

RAW = generate(200, 50)


@pytest.fixture(params=["disk", "disk with a space", "object store"])
def data_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "disk": str(tmp_path / "data"),
        "disk with a space": (tmp_path / "my data").as_uri(),
        "object store": f"memory://{secrets.token_hex(4)}",
    }[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_dataset_comes_back_as_it_was(data_url: str) -> None:
    manifest = write_dataset(RAW, data_url)
    splits = {name: load_split(data_url, manifest.dataset_id, name) for name in SPLIT_NAMES}
    np.testing.assert_array_equal(splits["test"].images, RAW.test_images)
    np.testing.assert_array_equal(splits["test"].labels, RAW.test_labels)
    for split in splits.values():
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
        assert list(split.ids) == content_ids(split.images)
        assert not split.images.flags.writeable
    where = {each: row for row, each in enumerate(content_ids(RAW.train_images))}
    for name in ("train", "validation"):
        rows = [where.pop(each) for each in splits[name].ids]
        assert rows == sorted(rows)
        np.testing.assert_array_equal(splits[name].labels, RAW.train_labels[rows])
    assert where == {}


def test_the_manifest_says_what_is_there(data_url: str) -> None:
    twice = np.concatenate([RAW.train_images, RAW.train_images[:10], RAW.test_images[:5]])
    labels = np.concatenate([RAW.train_labels, RAW.train_labels[:10], RAW.test_labels[:5]])
    written = write_dataset(replace(RAW, train_images=twice, train_labels=labels), data_url)
    manifest = read_manifest(data_url, written.dataset_id)
    assert manifest == written
    assert (manifest.dropped.duplicates, manifest.dropped.overlaps, manifest.dropped.conflicts) == (10, 5, 0)
    assert manifest.counts["train"] + manifest.counts["validation"] == 200
    assert manifest.class_histogram["test"] == dict.fromkeys(manifest.class_histogram["test"], 5)
    assert sum(manifest.class_histogram["train"].values()) == manifest.counts["train"]
    assert manifest.data == "SYNTHETIC"
    # What was dropped changes nothing: the same images make the same dataset.
    assert manifest.dataset_id == prepare(RAW).dataset_id


def test_writing_again_writes_nothing(folder: Path) -> None:
    first, created = commit(prepare(RAW), str(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again, created_again = commit(prepare(replace(RAW, source="elsewhere")), str(folder))
    assert (created, created_again) == (True, False)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def one_pixel(raw: RawDataset) -> RawDataset:
    images = raw.train_images.copy()
    images[0, 0, 0, 0] ^= 1
    return replace(raw, train_images=images)


@pytest.mark.parametrize(
    "change",
    [
        one_pixel,
        lambda raw: replace(raw, train_labels=np.roll(raw.train_labels, 1)),
        lambda raw: replace(raw, test_images=raw.test_images[::-1], test_labels=raw.test_labels[::-1]),
        lambda raw: replace(raw, data="cifar-10"),
    ],
)
def test_other_content_has_another_id(change: Callable[[RawDataset], RawDataset]) -> None:
    assert prepare(change(RAW)).dataset_id != prepare(RAW).dataset_id


def test_bad_data_leaves_nothing(folder: Path) -> None:
    with pytest.raises(DatasetInvalid, match="the first is 17 at image 3"):
        write_dataset(replace(RAW, train_labels=np.where(np.arange(200) == 3, 17, RAW.train_labels)), str(folder))
    assert not folder.exists()


def test_datasets_are_listed_newest_first(data_url: str) -> None:
    assert list_datasets(data_url) == []
    with pytest.raises(DatasetNotFound, match="No dataset") as error:
        latest_dataset_id(data_url)
    assert "cifar10 ingest" in error.value.fix
    written = [write_dataset(generate(100, 50, seed), data_url).dataset_id for seed in range(3)]
    assert [each.dataset_id for each in list_datasets(data_url)] == written[::-1]
    assert latest_dataset_id(data_url) == written[-1]


def test_an_unknown_id(data_url: str) -> None:
    for ask in (read_manifest, lambda url, name: load_split(url, name, "test")):
        with pytest.raises(DatasetNotFound, match="ds-000000000000") as error:
            ask(data_url, "ds-000000000000")
        assert "cifar10 ingest" in error.value.fix


def test_a_subset_is_stratified_and_seeded(data_url: str) -> None:
    dataset_id = write_dataset(RAW, data_url).dataset_id
    whole = load_split(data_url, dataset_id, "test")
    part = load_split(data_url, dataset_id, "test", limit=20, seed=3)
    assert np.bincount(part.labels).tolist() == [2] * 10
    assert list(part.ids) == content_ids(part.images)
    rows = [whole.ids.index(each) for each in part.ids]
    np.testing.assert_array_equal(whole.labels[rows], part.labels)
    assert part.ids == load_split(data_url, dataset_id, "test", limit=20, seed=3).ids
    assert part.ids != load_split(data_url, dataset_id, "test", limit=20, seed=4).ids
    assert load_split(data_url, dataset_id, "test", limit=1000).ids == whole.ids
    with pytest.raises(ConfigurationError, match="split of 0 images"):
        load_split(data_url, dataset_id, "test", limit=0)


def test_splits_longer_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.datasets.store.ROWS_PER_GROUP", 7)
    dataset_id = write_dataset(RAW, str(tmp_path)).dataset_id
    np.testing.assert_array_equal(load_split(str(tmp_path), dataset_id, "test").images, RAW.test_images)
    part = load_split(str(tmp_path), dataset_id, "test", limit=33)
    assert list(part.ids) == content_ids(part.images)
    assert len(part.ids) == 33


def test_other_tools_can_read_it(folder: Path) -> None:
    dataset_id = write_dataset(RAW, str(folder)).dataset_id
    table = pq.read_table(folder / "datasets" / dataset_id / "test.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "int8", "fixed_size_binary[3072]"]
    assert table.column("image")[7].as_py() == RAW.test_images[7].tobytes()
    assert table.column("label").to_pylist() == RAW.test_labels.tolist()


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_never_read(damage: str, folder: Path) -> None:
    dataset_id = write_dataset(RAW, str(folder)).dataset_id
    path = folder / "datasets" / dataset_id / "test.parquet"
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    if damage == "missing":
        path.unlink()
    with pytest.raises(DatasetInvalid, match=r"test\.parquet") as error:
        load_split(str(folder), dataset_id, "test")
    assert "cifar10 ingest" in error.value.fix
    load_split(str(folder), dataset_id, "train")


def test_an_altered_manifest_is_named(folder: Path) -> None:
    dataset_id = write_dataset(RAW, str(folder)).dataset_id
    (folder / "datasets" / dataset_id / MARKER).write_text('{"dataset_id": 3}')
    with pytest.raises(DatasetInvalid, match="not a manifest"):
        read_manifest(str(folder), dataset_id)


@pytest.mark.parametrize("after", [0, 100_000, 500_000])
def test_a_full_disk_leaves_nothing(after: int, data_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for `after` bytes."""
    written = 0

    def limited(original: Callable[..., IO[bytes]]) -> Callable[..., IO[bytes]]:
        def opened(self: object, path: str, mode: str = "rb", **options: object) -> IO[bytes]:
            file = original(self, path, mode, **options)
            if mode == "wb":
                write = file.write

                def limited_write(content: bytes) -> int:
                    nonlocal written
                    written += len(content)
                    if written > after:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return write(content)

                monkeypatch.setattr(file, "write", limited_write, raising=False)
            return file

        return opened

    with monkeypatch.context() as full:
        for kind in (LocalFileSystem, MemoryFileSystem):
            full.setattr(kind, "open", limited(kind.open))
        with pytest.raises(StorageError, match="No space left on device") as error:
            write_dataset(RAW, data_url)
    assert written > after
    assert "free some space" in error.value.fix
    assert list_datasets(data_url) == []
    storage = Storage(data_url)
    assert storage.fs.find(storage.root, withdirs=False) == []
    write_dataset(RAW, data_url)
    assert len(list_datasets(data_url)) == 1


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="could not be") as error:
        write_dataset(RAW, str(tmp_path / "file"))
    assert "MLOPS_DATA_URL" in error.value.fix


def test_an_address_that_nobody_knows() -> None:
    with pytest.raises(ConfigurationError, match="nonsense://"):
        list_datasets("nonsense://bucket")


KILLED = """
import os, signal, sys
from ml.datasets import storage, store
from ml.datasets.synthetic import generate

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, name = sys.argv[2].rsplit(".", 1)
setattr({"storage": storage, "store": store, "Storage": storage.Storage}[where], name, die)
store.write_dataset(generate(200, 50), sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["store._write_parquet", "store._describe", "storage._to_disk", "Storage._rename"])
def test_a_killed_writer_leaves_nothing_that_is_seen_and_its_rest_is_cleared(moment: str, folder: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert files_under(folder), "it was killed before it wrote"
    assert list_datasets(str(folder)) == []
    manifest = write_dataset(RAW, str(folder))
    assert [each.dataset_id for each in list_datasets(str(folder))] == [manifest.dataset_id]
    assert {path.split("/")[1] for path in files_under(folder)} == {manifest.dataset_id}


def test_a_living_writer_is_left_alone(folder: Path) -> None:
    storage = Storage(str(folder))
    with storage.commit("datasets/slow") as slow:
        with slow.open("a") as file:
            file.write(b"1")
        write_dataset(RAW, str(folder))
        with slow.open(MARKER) as file:
            file.write(b"{}")
    assert storage.read("datasets/slow/a") == b"1"


def test_two_writers_at_once_write_one_dataset(folder: Path) -> None:
    prepared, results = prepare(RAW), []
    start = threading.Barrier(4)

    def write() -> None:
        start.wait()
        results.append(commit(prepared, str(folder))[0].dataset_id)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [prepared.dataset_id] * 4
    assert [path.name for path in (folder / "datasets").iterdir()] == [prepared.dataset_id]
    load_split(str(folder), prepared.dataset_id, "train")


def test_what_lies_there_without_a_marker_is_replaced(folder: Path) -> None:
    dataset_id = write_dataset(RAW, str(folder)).dataset_id
    (folder / "datasets" / dataset_id / MARKER).unlink()
    assert list_datasets(str(folder)) == []
    assert commit(prepare(RAW), str(folder))[1]
    load_split(str(folder), dataset_id, "train")


def test_leftovers_on_an_object_store() -> None:
    url = f"memory://{secrets.token_hex(4)}"
    memory, root = fsspec.core.url_to_fs(url)
    dataset_id = prepare(RAW).dataset_id
    # A writer that was killed while it copied, one killed two days ago, and one that may still be at work.
    for name in (dataset_id, f".staging-{dataset_id}-old", f".staging-{dataset_id}-new"):
        memory.makedirs(f"{root}/datasets/{name}")
        memory.pipe(f"{root}/datasets/{name}/train.parquet", b"half")
    old = memory.store[f"{root}/datasets/.staging-{dataset_id}-old/train.parquet"]
    old.modified = datetime.now(UTC) - timedelta(days=2)
    assert list_datasets(url) == []
    write_dataset(RAW, url)
    assert {path.split("/")[-2] for path in memory.find(root)} == {dataset_id, f".staging-{dataset_id}-new"}
    assert [each.dataset_id for each in list_datasets(url)] == [dataset_id]
    load_split(url, dataset_id, "train")


def test_a_writer_that_fails_on_an_object_store_takes_nothing_from_another() -> None:
    """A task that was given up may live on beside its second attempt, and fail when that one is done, or nearly."""
    url = f"memory://{secrets.token_hex(4)}"
    storage, dataset_id = Storage(url), prepare(RAW).dataset_id
    with pytest.raises(RuntimeError), storage.commit(f"datasets/{dataset_id}") as slow:  # noqa: PT012
        with slow.open("train.parquet") as file:
            file.write(b"half")
        write_dataset(RAW, url)
        raise RuntimeError
    load_split(url, dataset_id, "train")
    with storage.commit(f"datasets/{dataset_id}") as slower:
        for name in ("train.parquet", MARKER):
            with slower.open(name) as file:
                file.write(b"of another version of this program")
    load_split(url, dataset_id, "train")
    assert [path for path in storage.fs.find(storage.root) if "staging" in path] == []
