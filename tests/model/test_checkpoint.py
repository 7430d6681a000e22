"""Checkpoints as files: whole or not at all, of one training, and refused where they cannot be read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from ml.errors import StorageError, TrainingError
from ml.models.vgg16_weights import Weights
from ml.training.checkpoint import Checkpoint, Position, assign, read
from ml.training.fit import identity_of
from tests.model.conftest import BASELINE, TINY_VGG16

IDENTITY = {"recipe": "abc", "seed": "1"}


def position() -> Position:
    many = [np.full((2, 3), i, np.float32) for i in range(12)]  # more than ten: the order is not that of the digits
    return Position(
        run_id="r1",
        stage=1,
        finished=[{"name": "head", "epochs": [{"loss": 0.1}]}],
        epochs=[{"loss": 0.25, "val_loss": 1 / 3}],
        seconds=1.5,
        model=many,
        optimizer=[np.array(7, np.int64), np.zeros((0,), np.float32)],
        best=[np.array([1, 2], np.uint32)],
    )


def plain(of: Position) -> dict[str, Any]:
    return {
        name: [(a.dtype, a.shape, a.tolist()) for a in value] if name in ("model", "optimizer", "best") else value
        for name in Position.__dataclass_fields__
        for value in [getattr(of, name)]
    }


def test_a_training_is_told_from_others_and_from_its_like_elsewhere(tmp_path: Path) -> None:
    here = Checkpoint(tmp_path, IDENTITY).origin
    assert here == Checkpoint(tmp_path, dict(IDENTITY)).origin
    assert here != Checkpoint(tmp_path / "other", IDENTITY).origin
    assert here != Checkpoint(tmp_path, {**IDENTITY, "seed": "2"}).origin
    assert str(tmp_path) not in here, "it is shown in MLflow"


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "new", IDENTITY)
    assert checkpoint.load() is None
    checkpoint.save(position())
    found = Checkpoint(tmp_path / "new", dict(reversed(IDENTITY.items()))).load()
    assert found is not None
    assert found.wall_seconds > 0
    assert found.peak_memory_mib > 1
    found.wall_seconds = found.peak_memory_mib = 0.0
    assert plain(found) == plain(position())
    found.epochs.append({"loss": 0.2})
    checkpoint.save(found)
    again = checkpoint.load()
    assert again is not None
    assert len(again.epochs) == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [checkpoint.path.name]
    checkpoint.clear()
    checkpoint.clear()
    assert checkpoint.load() is None


def test_times_and_memory_add_up_over_processes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    before = Position(run_id="r", wall_seconds=100.0, peak_memory_mib=1e6)
    assert 100 <= checkpoint.wall_seconds(before) < 160
    assert checkpoint.peak_memory_mib(before) == 1e6


def test_nobody_trains_the_same_beside_one_that_does(tmp_path: Path) -> None:
    mine, again, other = (Checkpoint(tmp_path, {"seed": seed}) for seed in ("1", "1", "2"))
    with mine.held(), other.held(), pytest.raises(TrainingError, match="Another process trains"), again.held():
        pass
    with again.held():
        pass
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError), Checkpoint(tmp_path / "file", IDENTITY).held():
        pass


def test_another_trainings_file_is_another_file_and_refused_where_it_is_put_in_its_place(tmp_path: Path) -> None:
    mine, other = Checkpoint(tmp_path, IDENTITY), Checkpoint(tmp_path, IDENTITY | {"seed": "2"})
    mine.save(position())
    assert other.load() is None
    shutil.copy(mine.path, other.path)
    with pytest.raises(TrainingError, match="of another training: its seed differ") as caught:
        other.load()
    assert "without --resume" in caught.value.fix


@pytest.mark.parametrize(
    "torn",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[:300] + b"\xff" * 50 + whole[350:],
        lambda _: b"",
        lambda _: b"no checkpoint",
        lambda _: b"PK\x03\x04 nor this",
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, torn: Callable[[bytes], bytes]) -> None:
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    checkpoint.save(position())
    checkpoint.path.write_bytes(torn(checkpoint.path.read_bytes()))
    with pytest.raises(TrainingError, match="cannot be read") as caught:
        checkpoint.load()
    assert "delete it" in caught.value.fix


def test_a_file_of_other_fields_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    for facts in (b"{}", b'{"identity": {}, "run_id": "", "unknown": 1}', b"[]"):
        np.savez(checkpoint.path, facts=np.frombuffer(facts, np.uint8))
        with pytest.raises(TrainingError, match="cannot be read"):
            checkpoint.load()


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    checkpoint.save(position())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    later = position()
    later.epochs = []
    with pytest.raises(StorageError, match="No space left"):
        checkpoint.save(later)
    assert list(tmp_path.iterdir()) == [checkpoint.path]
    found = checkpoint.load()
    assert found is not None
    assert found.epochs == position().epochs


def test_values_are_given_only_to_variables_that_fit() -> None:
    dense = keras.layers.Dense(3)
    dense.build((None, 2))
    values = read(dense.variables)
    values[0] = values[0] + 1
    assign(dense.variables, values)
    assert np.array_equal(dense.kernel, values[0])
    for wrong in (values[:1], [values[0].T, values[1]], []):
        with pytest.raises(TrainingError, match="do not fit the 2 variables"):
            assign(dense.variables, wrong)


def test_a_checkpoint_belongs_to_one_recipe_seed_dataset_weights_backend_and_purpose() -> None:
    base = identity_of(BASELINE, "ds-1", None, "tensorflow", "candidate")
    others = [
        identity_of(BASELINE, "ds-1", None, "tensorflow", "run"),
        identity_of(BASELINE.with_overrides({"seed": 3}), "ds-1", None, "tensorflow", "candidate"),
        identity_of(BASELINE.with_overrides({"stages.fit.epochs": 3}), "ds-1", None, "tensorflow", "candidate"),
        identity_of(BASELINE, "ds-2", None, "tensorflow", "candidate"),
        identity_of(BASELINE, "ds-1", None, "jax", "candidate"),
        identity_of(TINY_VGG16, "ds-1", Weights("random"), "tensorflow", "candidate"),
        identity_of(TINY_VGG16, "ds-1", Weights("file", Path("x"), "a" * 64), "tensorflow", "candidate"),
        identity_of(TINY_VGG16, "ds-1", Weights("file", Path("x"), "b" * 64), "tensorflow", "candidate"),
    ]
    names = {Checkpoint(Path(), identity).path.name for identity in [base, *others]}
    assert len(names) == 9
