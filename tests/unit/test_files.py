"""Files appear whole or not at all."""

import pytest

from ml.files import write_whole


def test_what_is_written_is_read(tmp_path):
    write_whole(tmp_path / "new" / "text", "größer")
    assert (tmp_path / "new" / "text").read_text() == "größer"
    write_whole(tmp_path / "new" / "text", b"\x00\x01")
    assert (tmp_path / "new" / "text").read_bytes() == b"\x00\x01"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text"]


def test_a_private_file_is_private(tmp_path):
    write_whole(tmp_path / "secret", "s", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_old_content_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
