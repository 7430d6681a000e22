"""The reference file: round trip, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.errors import ModelInvalid, StorageError
from ml.monitoring.reference import COLUMNS, STATISTIC_NAMES, read_reference, write_reference


@pytest.fixture
def arrays() -> dict:
    generator = np.random.default_rng(0)
    return {
        "labels": generator.integers(0, 10, 50),
        "probabilities": generator.dirichlet(np.ones(10), 50).astype(np.float32),
        "statistics": {name: generator.random(50).astype(np.float32) for name in STATISTIC_NAMES},
    }


def test_round_trip_keeps_every_value(tmp_path, arrays):
    path = write_reference(tmp_path / "new" / "reference.parquet", **arrays)
    reference = read_reference(path)
    assert tuple(pq.read_schema(path).names) == COLUMNS
    assert len(reference) == 50
    np.testing.assert_array_equal(reference.labels, arrays["labels"])
    np.testing.assert_array_equal(reference.probabilities, arrays["probabilities"])
    np.testing.assert_array_equal(reference.class_ids, arrays["probabilities"].argmax(axis=1))
    for name in STATISTIC_NAMES:
        np.testing.assert_array_equal(reference.statistics[name], arrays["statistics"][name])
    assert list(reference.columns()) == [f"p_{i}" for i in range(10)] + list(STATISTIC_NAMES)
    assert [p.name for p in path.parent.iterdir()] == ["reference.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(0, int)}, "no prediction"),
        ({"labels": np.zeros(49, int)}, "probabilities have shape"),
        ({"labels": np.full(50, 10)}, "labels span 10 to 10"),
        ({"labels": np.zeros(50)}, "expected integers"),
        ({"probabilities": np.full((50, 10), np.nan)}, "not probabilities"),
        ({"probabilities": np.full((50, 10), 0.2)}, "not probabilities"),
        ({"statistics": {}}, "brightness"),
        ({"statistics": {name: np.full(50, np.inf) for name in STATISTIC_NAMES}}, "finite"),
    ],
)
def test_what_is_no_reference_is_refused_and_leaves_nothing(tmp_path, arrays, change, message):
    with pytest.raises(ModelInvalid, match=message):
        write_reference(tmp_path / "reference.parquet", **(arrays | change))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_broken_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "reference.parquet"
    with pytest.raises(ModelInvalid, match="cannot be read"):
        read_reference(path)
    path.write_bytes(b"PAR1 this is not Parquet PAR1")
    with pytest.raises(ModelInvalid, match="cannot be read"):
        read_reference(path)
    pq.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(ModelInvalid, match="no column predicted"):
        read_reference(path)


def test_a_refusing_disk_is_a_storage_error_and_leaves_nothing(tmp_path, arrays, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        write_reference(tmp_path / "reference.parquet", **arrays)
    assert list(Path(tmp_path).iterdir()) == []
