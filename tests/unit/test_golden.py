"""Golden images: the choice, and the file."""

import numpy as np
import pytest

from ml.errors import InputInvalid, ModelInvalid, StorageError
from ml.evaluation.golden import Golden, choose, read_golden, write_golden

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def sure(*answers):
    """Probabilities, float64 (n, 10): (class, probability) of each row; the rest is shared evenly."""
    rows = np.array([np.full(10, (1 - p) / 9) for _, p in answers])
    for row, (class_id, p) in zip(rows, answers, strict=True):
        row[class_id] = p
    return rows


def test_of_each_class_the_most_certain_that_is_right():
    labels = np.array([3, 3, 3, 7, 7, 0])
    # 3: the second is surest, the third is surer and wrong; 7: two equals; 0: none is right.
    given = sure((3, 0.6), (3, 0.8), (5, 0.9), (7, 0.7), (7, 0.7), (1, 0.9))
    golden = choose(IMAGES, labels, given)
    assert golden.labels.tolist() == [3, 7]
    np.testing.assert_array_equal(golden.images, IMAGES[[1, 3]])
    np.testing.assert_array_equal(golden.probabilities, given[[1, 3]].astype(np.float32))
    assert "cat" not in golden.missing
    assert len(golden.missing) == 8
    none = choose(IMAGES, labels, np.roll(given, 1, axis=1))
    assert none.images.shape == (0, 32, 32, 3)
    assert len(none.missing) == 10


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InputInvalid, match="do not fit"):
        choose(IMAGES, np.zeros(5, np.int64), np.full((6, 10), 0.1))


def test_what_is_written_is_read(tmp_path):
    for rows in (6, 0):
        golden = Golden(IMAGES[:rows], np.arange(rows), np.full((rows, 10), 0.1, np.float32))
        back = read_golden(write_golden(tmp_path / "new" / "golden.npz", golden))
        for name in ("images", "labels", "probabilities"):
            np.testing.assert_array_equal(getattr(back, name), getattr(golden, name))
            assert getattr(back, name).dtype == getattr(golden, name).dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["golden.npz"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": IMAGES[:3]}, "holds images"),
        ({"images": IMAGES.astype(np.float32)}, "float32"),
        ({"labels": np.array([1, 2, 3, 4, 5, 10])}, "labels"),
        ({"labels": np.array([1, 1, 2, 3, 4, 5])}, "labels"),
        ({"probabilities": np.full((6, 10), np.nan, np.float32)}, "not finite"),
    ],
)
def test_what_no_model_can_have_given_is_refused(tmp_path, change, said):
    arrays = {"images": IMAGES, "labels": np.arange(6), "probabilities": np.full((6, 10), 0.1, np.float32)}
    with pytest.raises(ModelInvalid, match=said):
        read_golden(write_golden(tmp_path / "golden.npz", Golden(**(arrays | change))))


def test_another_file_is_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "golden.npz"
    whole = write_golden(path, Golden(IMAGES, np.arange(6), np.full((6, 10), 0.1, np.float32))).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ModelInvalid, match="no file of golden images"):
            read_golden(path)
    np.savez(path, images=IMAGES)
    with pytest.raises(ModelInvalid, match="KeyError"):
        read_golden(path)
    np.savez(path, images=np.array([{}], dtype=object), labels=np.arange(6), probabilities=np.ones((6, 10)))
    with pytest.raises(ModelInvalid, match="ValueError"):
        read_golden(path)


def test_a_disk_that_refuses_is_not_the_models_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        write_golden(tmp_path / "file" / "golden.npz", Golden(IMAGES, np.arange(6), np.ones((6, 10), np.float32)))
    with pytest.raises(StorageError):
        read_golden(tmp_path / "gone.npz")
