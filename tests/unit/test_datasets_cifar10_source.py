"""Where CIFAR-10 is found, and what is refused before anything is read from it."""

import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ml.datasets.cifar10 import ARCHIVE_NAME, OFFICIAL_LAYOUT, load_cifar10
from ml.datasets.download import RetryPolicy
from ml.datasets.raw import RawDataset
from ml.datasets.synthetic import generate
from ml.errors import ConfigurationError, SourceCorrupt, SourceNotFound, SourceUnreachable
from tests.cifar10_archive import FOLDER, add_member, batch_files, layout_of, write_archive, write_folder

FILES = batch_files()
LAYOUT = layout_of(FILES)
RAW = generate(200, 50)
NOWHERE = "http://127.0.0.1:9/cifar-10-python.tar.gz"
IMPATIENT = RetryPolicy(fruitless_attempts=2, first_wait=0.01, longest_wait=0.01, connect_timeout=1, read_timeout=1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the current folder nor Keras' cache of the machine may lend a copy."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def load(source: str | Path, tmp_path: Path, *, allow_stand_in: bool = False) -> RawDataset:
    cache = tmp_path / "cache"
    return load_cifar10(str(source), cache, allow_stand_in, layout=LAYOUT, url=NOWHERE, retries=IMPATIENT)


def assert_is_the_archive(raw: RawDataset) -> None:
    np.testing.assert_array_equal(raw.train_images, RAW.train_images)
    np.testing.assert_array_equal(raw.train_labels, RAW.train_labels)
    np.testing.assert_array_equal(raw.test_images, RAW.test_images)
    np.testing.assert_array_equal(raw.test_labels, RAW.test_labels)
    assert raw.data == "cifar-10"
    assert raw.source_checksums == LAYOUT.md5


def archive_in(folder: Path) -> Path:
    return write_archive(folder / ARCHIVE_NAME, FILES)


WAYS: dict[str, Callable[[Path], str]] = {
    "archive": lambda tmp: str(archive_in(tmp)),
    "relative path": lambda tmp: os.path.relpath(archive_in(tmp)),
    "home": lambda tmp: f"~/{archive_in(tmp / 'home').name}",
    "file URL with a space": lambda tmp: archive_in(tmp / "a folder").as_uri(),
    "folder": lambda tmp: str(write_folder(tmp, FILES)),
    "folder above": lambda tmp: str(write_folder(tmp, FILES).parent),
    "auto, current folder": lambda tmp: "auto" if archive_in(Path.cwd()) else "",
    "auto, cache": lambda tmp: "auto" if archive_in(tmp / "cache") else "",
    "auto, Keras": lambda tmp: "auto" if write_folder(tmp / "home" / ".keras" / "datasets", FILES) else "",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_a_source_gives_the_same_data(way: str, tmp_path: Path) -> None:
    assert_is_the_archive(load(WAYS[way](tmp_path), tmp_path))


def test_synthetic_is_labelled(tmp_path: Path) -> None:
    assert load("synthetic", tmp_path).data == "SYNTHETIC"


def test_the_official_checksums_are_what_is_expected_by_default(tmp_path: Path) -> None:
    assert OFFICIAL_LAYOUT.md5["test_batch"] == "40351d587109b95175f43aff81a1287e"
    with pytest.raises(SourceCorrupt, match="expected c99cafc152244af753f735de768cd75f"):
        load_cifar10(str(archive_in(tmp_path)), tmp_path / "cache", allow_stand_in=True)


def test_an_altered_file_is_named_with_both_checksums(tmp_path: Path) -> None:
    content = bytearray(FILES["data_batch_3"])
    content[-500] ^= 1
    path = write_archive(tmp_path / "a.tar.gz", {**FILES, "data_batch_3": bytes(content)})
    with pytest.raises(SourceCorrupt, match=f"data_batch_3 has md5 .*{LAYOUT.md5['data_batch_3']}"):
        load(path, tmp_path)


def test_the_checksum_comes_before_the_content(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = write_archive(tmp_path / "a.tar.gz", {**FILES, "data_batch_1": pickle.dumps(Bomb())})
    with pytest.raises(SourceCorrupt, match="data_batch_1 has md5"):
        load(path, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 5_000, -1])
def test_a_truncated_archive_is_refused(keep: int, tmp_path: Path) -> None:
    whole = archive_in(tmp_path).read_bytes()
    path = tmp_path / "short.tar.gz"
    # The last file's data end well before the archive does: cut within them.
    path.write_bytes(whole[:keep] if keep >= 0 else whole[: len(whole) - 3_000])
    with pytest.raises(SourceCorrupt) as error:
        load(path, tmp_path)
    assert str(path) in error.value.message
    assert "fetch it again" in error.value.fix


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.tar.gz"
    path.write_text("<html>Please log in</html>")
    with pytest.raises(SourceCorrupt, match="cannot be unpacked"):
        load(path, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    files = {name: content for name, content in FILES.items() if name != "data_batch_5"}
    with pytest.raises(SourceCorrupt, match="it has no data_batch_5"):
        load(write_archive(tmp_path / "a.tar.gz", files), tmp_path)
    with pytest.raises(SourceCorrupt, match="has no file data_batch_5"):
        load(write_folder(tmp_path, files), tmp_path)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    files = {**FILES, "batches.meta": pickle.dumps({b"label_names": [b"apple", b"bear"]}, protocol=2)}
    path = write_archive(tmp_path / "a.tar.gz", files)
    with pytest.raises(SourceCorrupt, match="apple, bear"):
        load_cifar10(str(path), tmp_path / "cache", False, layout=layout_of(files))


def test_members_that_point_elsewhere_write_and_read_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["data_batch_1"])
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add_member(archive, "../escaped", b"x")
        add_member(archive, str(tmp_path / "absolute"), b"x")
        link = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        for name, content in FILES.items():
            if name != "data_batch_1":
                add_member(archive, f"{FOLDER}/{name}", content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceCorrupt, match="it has no data_batch_1"):
        load(path, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add_member(archive, f"{FOLDER}/data_batch_1", bytes(65 << 20))
    with pytest.raises(SourceCorrupt, match="data_batch_1 has 68157440 bytes"):
        load(path, tmp_path)


def test_a_path_where_nothing_lies(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=f"looked for {Path.cwd()}/no.tar.gz"):
        load("no.tar.gz", tmp_path)


def test_an_address_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ftp://"):
        load("ftp://example.org/cifar.tar.gz", tmp_path)


def test_auto_without_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable) as error:
        load("auto", tmp_path)
    for remedy in (ARCHIVE_NAME, "CIFAR10_SOURCE", "synthetic", str(tmp_path / "cache")):
        assert remedy in error.value.fix


def test_auto_passes_over_what_is_no_file(tmp_path: Path) -> None:
    # Where no archive was given, a container has a device in its place.
    Path(ARCHIVE_NAME).symlink_to(os.devnull)
    with pytest.raises(SourceUnreachable):
        load("auto", tmp_path)


def test_auto_falls_back_only_where_allowed_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = load("auto", tmp_path, allow_stand_in=True)
    assert raw.data == "SYNTHETIC"
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any("SYNTHETIC" in warning for warning in warnings)


def test_a_source_that_is_named_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        load("no.tar.gz", tmp_path, allow_stand_in=True)
    with pytest.raises(SourceUnreachable):
        load(NOWHERE, tmp_path, allow_stand_in=True)


def test_auto_passes_over_a_broken_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path(ARCHIVE_NAME).write_bytes(b"half a download")
    write_folder(tmp_path / "home" / ".keras" / "datasets", FILES)
    assert_is_the_archive(load("auto", tmp_path))
    assert f"Not using {ARCHIVE_NAME}" in caplog.text
