"""The CSV export gives the images back to a reader that knows nothing of this code."""

import csv
import errno
import gzip
import io
import secrets
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import pytest

from ml.datasets import csv_export
from ml.datasets.csv_export import write_csv
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.manifest import Split
from ml.datasets.splits import SPLIT_NAMES
from ml.datasets.storage import Storage
from ml.datasets.store import list_datasets, load_split, write_dataset
from ml.datasets.synthetic import generate
from ml.errors import DatasetNotFound, StorageError

RAW = generate(200, 50)


def exported(data_url: str, dataset_id: str, split: str) -> bytes:
    content = Storage(data_url).read(f"datasets/{dataset_id}/csv/{split}.csv.gz")
    assert content is not None
    return content


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_every_split_round_trips(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_export, "_ROWS_AT_ONCE", 7)
    data_url = str(tmp_path) if kind == "disk" else f"memory://{secrets.token_hex(4)}"
    dataset_id = write_dataset(RAW, data_url).dataset_id
    manifest, created = write_csv(data_url, dataset_id)
    assert created
    for name in SPLIT_NAMES:
        frame = pd.read_csv(io.BytesIO(exported(data_url, dataset_id, name)), compression="gzip")
        split = load_split(data_url, dataset_id, name)
        assert manifest.rows[name] == len(frame) == len(split.ids)
        pixels = frame.filter(like="pixel_").to_numpy("uint8").reshape(-1, 32, 32, 3)
        np.testing.assert_array_equal(pixels, split.images)
        np.testing.assert_array_equal(frame["label"], split.labels)
        assert frame["label_name"].tolist() == [CLASS_NAMES[label] for label in split.labels]


def test_pixel_columns_are_where_the_documentation_says(tmp_path: Path) -> None:
    dataset_id = write_dataset(RAW, str(tmp_path)).dataset_id
    write_csv(str(tmp_path), dataset_id)
    rows = csv.DictReader(io.StringIO(gzip.decompress(exported(str(tmp_path), dataset_id, "test")).decode("ascii")))
    first = next(rows)
    assert list(first)[:3] == ["label", "label_name", "pixel_0"]
    assert len(first) == 3074
    assert int(first[f"pixel_{(5 * 32 + 7) * 3 + 2}"]) == RAW.test_images[0, 5, 7, 2]


def test_every_pixel_value_is_written_as_a_number() -> None:
    image = np.arange(3072, dtype=np.int64).astype(np.uint8).reshape(1, 32, 32, 3)
    (line,) = csv_export.csv_lines(Split(image, np.array([9]), ("x",)))
    assert line == ("9,truck," + ",".join(str(value % 256) for value in range(3072)) + "\n").encode()


def test_exporting_again_writes_nothing_and_anew_writes_the_same(tmp_path: Path) -> None:
    contents = []
    for url in (str(tmp_path / "one"), str(tmp_path / "two")):
        dataset_id = write_dataset(RAW, url).dataset_id
        first, created = write_csv(url, dataset_id)
        before = {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")}
        again, created_again = write_csv(url, dataset_id)
        assert (created, created_again, again) == (True, False, first)
        assert {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")} == before
        contents.append(exported(url, dataset_id, "train"))
    assert contents[0] == contents[1]


def test_a_failed_export_leaves_the_dataset_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = write_dataset(RAW, str(tmp_path)).dataset_id
    before = sorted(tmp_path.rglob("*"))
    lines = csv_export.csv_lines

    def full(batch: Split) -> NoReturn:
        next(lines(batch))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(csv_export, "csv_lines", full)
        with pytest.raises(StorageError, match="No space left"):
            write_csv(str(tmp_path), dataset_id)
    assert sorted(tmp_path.rglob("*")) == before
    assert [each.dataset_id for each in list_datasets(str(tmp_path))] == [dataset_id]
    assert write_csv(str(tmp_path), dataset_id)[1]


def test_there_is_no_such_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        write_csv(str(tmp_path), "ds-000000000000")
    assert not (tmp_path / "datasets" / "ds-000000000000").exists()
