"""Which image goes where: stable, without leaks, and every dropped image counted."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ml.datasets.splits import content_ids, is_validation, partition, stratified_rows


def ids(*names: object) -> list[str]:
    return [hashlib.sha256(str(name).encode()).hexdigest() for name in names]


def test_an_id_is_the_sha256_of_the_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert content_ids(images) == [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    # Bytes in memory do not matter, values do.
    assert content_ids(np.asfortranarray(images)) == content_ids(images)


def test_a_tenth_is_validation() -> None:
    share = np.mean([is_validation(each) for each in ids(*range(20_000))])
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 20_000)


def test_bounds_of_the_hash() -> None:
    assert is_validation("0" * 64)
    assert not is_validation("f" * 64)


@given(st.lists(st.integers(0, 60), max_size=80), st.lists(st.integers(0, 60), max_size=10))
def test_every_row_is_used_once_or_counted(train: list[int], test: list[int]) -> None:
    labels = np.array([value % 10 for value in train], dtype=np.int64)
    train_ids, test_ids = ids(*train), ids(*test)
    parts = partition(train_ids, labels, test_ids)
    kept = [*parts.train, *parts.validation]
    assert len(set(kept)) == len(kept)
    assert len(kept) + parts.duplicates + parts.overlaps + parts.conflicts == len(train)
    kept_ids = [train_ids[row] for row in kept]
    assert len(set(kept_ids)) == len(kept_ids)
    assert set(kept_ids) == set(train_ids) - set(test_ids)


@given(st.sets(st.integers(0, 1000), min_size=1, max_size=50), st.sets(st.integers(1001, 2000), max_size=50))
def test_an_image_keeps_its_side_when_others_come(first: set[int], more: set[int]) -> None:
    def validation(values: list[int]) -> set[int]:
        parts = partition(ids(*values), np.zeros(len(values), dtype=np.int64), [])
        return {values[row] for row in parts.validation}

    assert validation(sorted(first)) == validation(sorted(more) + sorted(first)) & first


def test_each_kind_of_drop_is_counted_apart() -> None:
    train_ids = ids("a", "a", "b", "c", "c", "c", "d")
    labels = np.array([1, 1, 2, 3, 4, 3, 5])
    parts = partition(train_ids, labels, ids("b", "z"))
    assert (parts.duplicates, parts.overlaps, parts.conflicts) == (1, 1, 3)
    assert sorted([*parts.train, *parts.validation]) == [0, 6]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.data(), st.integers(0, 5))
def test_a_subset_keeps_the_proportions(values: list[int], data: st.DataObject, seed: int) -> None:
    labels = np.array(values)
    limit = data.draw(st.integers(0, len(values)))
    rows = stratified_rows(labels, limit, seed)
    assert len(rows) == limit
    assert np.all(np.diff(rows) > 0)
    quota = np.bincount(labels, minlength=10) * limit / len(labels)
    assert np.all(np.abs(np.bincount(labels[rows], minlength=10) - quota) < 1)
    np.testing.assert_array_equal(rows, stratified_rows(labels, limit, seed))


def test_the_seed_chooses() -> None:
    labels = np.arange(1000) % 10
    assert stratified_rows(labels, 100, 0).tolist() != stratified_rows(labels, 100, 1).tolist()
