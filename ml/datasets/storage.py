"""Where datasets lie: a local folder or any fsspec URL, with folders that appear whole or not at all.

A folder is committed by its marker file. On a local disk it is written under a staging name and renamed; on an
object store, which cannot rename, its files are written in place and the marker last. Readers look for markers only,
so whatever a killed writer leaves is invisible, and the next writer clears it away. What the files hold is others'
business.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ml.errors import ConfigurationError, StorageError

MARKER = "manifest.json"
_STAGING = ".staging-"
LEFTOVER_SECONDS = 24 * 3600.0
"""When a folder without marker on an object store counts as left by a dead writer: no write takes a day."""


class FolderWriter:
    """Writes the files of one folder that is not committed yet."""

    def __init__(self, storage: "Storage", path: str) -> None:
        self._storage = storage
        self.path = path

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for writing; a name with "/" lies in a subfolder."""
        path = f"{self.path}/{name}"
        self._storage.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self._storage.fs.open(path, "wb")


class Storage:
    """Files under one URL. Paths are relative to it, with "/".

    Args:
        url: "file:///...", a plain path, or any URL that fsspec can open.

    Raises:
        ConfigurationError: fsspec does not know the URL's scheme, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("file://"):
            # fsspec takes file URLs literally; Path.as_uri writes a space as %20.
            url = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(
                f"MLOPS_DATA_URL={url!r} cannot be opened: {error}.",
                fix="use file:///path, or install the scheme's fsspec driver (s3fs for s3://, gcsfs for gs://).",
            ) from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def url(self, path: str) -> str:
        """The address of a path, for people and other programs."""
        full = self._full(path)
        return Path(full).as_uri() if self.local else str(self.fs.unstrip_protocol(full))

    def local_path(self, path: str) -> Path | None:
        """The path on this machine's disk; None where it lies elsewhere."""
        return Path(self._full(path)) if self.local else None

    def open(self, path: str) -> IO[bytes]:
        """Opens a file for reading. Raises FileNotFoundError, as `open` does."""
        return self.fs.open(self._full(path), "rb")

    def read(self, path: str) -> bytes | None:
        """A whole file; None where there is none.

        Raises:
            StorageError: the store could not be asked.
        """
        try:
            with self.open(path) as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refused(error, self.url(path), "read") from error

    def committed(self, path: str) -> bool:
        """Whether the folder is there, whole."""
        return self.read(f"{path}/{MARKER}") is not None

    def committed_folders(self, path: str) -> list[str]:
        """Names of the whole folders directly under `path`, sorted.

        Raises:
            StorageError: the store could not be asked.
        """
        return sorted(name for name in self._folders(path) if self.committed(f"{path}/{name}"))

    def files(self, path: str) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file directly under a folder.

        Raises:
            StorageError: the store could not be asked.
        """
        try:
            for full in sorted(self.fs.find(self._full(path), maxdepth=1)):
                yield full.rpartition("/")[2], self.fs.cat_file(full)
        except OSError as error:
            raise refused(error, self.url(path), "read") from error

    @contextmanager
    def commit(self, target: str) -> Iterator[FolderWriter]:
        """Writes the folder `target`: what the block wrote appears when the block wrote MARKER and ended well.

        The block must write MARKER last. When it raises, nothing is left. When another writer committed the same
        folder meanwhile, that one stays.

        Raises:
            StorageError: the disk or the store refused: full, not permitted, away.
        """
        parent, _, name = target.rpartition("/")
        try:
            with self._staging(parent, name) if self.local else self._in_place(parent, name) as writer:
                yield writer
        except OSError as error:
            raise refused(error, self.url(target), "written") from error

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _folders(self, path: str) -> list[str]:
        try:
            self.fs.invalidate_cache()
            entries = self.fs.ls(self._full(path), detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refused(error, self.url(path), "listed") from error
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
        return [name for name in names if not name.startswith(".")]

    @contextmanager
    def _staging(self, parent: str, name: str) -> Iterator[FolderWriter]:
        base = Path(self._full(parent))
        base.mkdir(parents=True, exist_ok=True)
        _clear_dead_staging(base)
        folder, lock = _locked_folder(base, name)
        try:
            yield FolderWriter(self, str(folder))
            for file in sorted(folder.rglob("*")):
                _to_disk(file)
            _to_disk(folder)
            self._rename(folder, base / name)
            _to_disk(base)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    @staticmethod
    def _rename(folder: Path, target: Path) -> None:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (target / MARKER).exists():
                return  # another writer was first, with the same content
            shutil.rmtree(target)
            folder.rename(target)

    @contextmanager
    def _in_place(self, parent: str, name: str) -> Iterator[FolderWriter]:
        self._clear_old_leftovers(parent)
        full = self._full(f"{parent}/{name}")
        try:
            yield FolderWriter(self, full)
        except BaseException:
            if not self.committed(f"{parent}/{name}") and self.fs.exists(full):
                self.fs.rm(full, recursive=True)
            raise

    def _clear_old_leftovers(self, parent: str) -> None:
        for name in self._folders(parent):
            if self.committed(f"{parent}/{name}"):
                continue
            full = self._full(f"{parent}/{name}")
            written = [_timestamp(self.fs.modified(file)) for file in self.fs.find(full)]
            if written and max(written) < time.time() - LEFTOVER_SECONDS:
                self.fs.rm(full, recursive=True)


def refused(error: OSError, where: str, what: str) -> StorageError:
    """The error for a disk or store that said no. `what`: "read", "written", "listed"."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space there (`cifar10 ingest` needs about 200 MB, the CSV export 250 MB more) and run it again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        fix = "grant this user the right to it"
    else:
        fix = "check the disk or the object store, its address and credentials, and run it again"
    why = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    return StorageError(f"{where} could not be {what}: {why}.", fix=f"{fix}, or set MLOPS_DATA_URL to another place.")


def _timestamp(modified: datetime) -> float:
    return modified.timestamp()


def _locked_folder(base: Path, name: str) -> tuple[Path, int]:
    """A new staging folder whose lock this process holds until it ends, however it ends."""
    while True:
        folder = base / f"{_STAGING}{name}-{secrets.token_hex(4)}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # another writer took it for a dead one's before the lock was held


def _clear_dead_staging(base: Path) -> None:
    for folder in base.glob(f"{_STAGING}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer lives
        finally:
            os.close(lock)


def _to_disk(path: Path) -> None:
    """A rename may reach the disk before the bytes it names, unless they were sent first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
