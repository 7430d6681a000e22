"""Where datasets lie: a local folder or any fsspec URL, with folders that appear whole or not at all.

A folder is committed by its marker file, and each writer writes under a staging name of its own. On a local disk the
folder is then renamed; an object store cannot rename, so the store copies the finished files to their place, the marker
last. Readers look for markers only: whatever a killed writer leaves is invisible, and a later writer clears it away.
What the files hold is others' business; how stores differ is `drivers`'.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from ml.datasets import drivers
from ml.errors import StorageError

MARKER = "manifest.json"
_STAGING = ".staging-"
LEFTOVER_SECONDS = 24 * 3600.0
"""When a staging folder on an object store counts as left by a dead writer: no write takes a day."""


class FolderWriter:
    """Writes the files of one folder that is not committed yet."""

    def __init__(self, storage: "Storage", path: str) -> None:
        self._storage = storage
        self.path = path

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a file for writing; a name with "/" lies in a subfolder."""
        return self._storage.driver.writing(f"{self.path}/{name}")


class Storage:
    """Files under one URL. Paths are relative to it, with "/".

    Args:
        url: "file:///...", a plain path, or any URL that fsspec can open.

    Raises:
        ConfigurationError: as `drivers.connect` does.
    """

    def __init__(self, url: str) -> None:
        self.driver = drivers.connect(url)
        self.fs, self.root, self.local = self.driver.fs, self.driver.root, self.driver.local
        self._refusals = self.driver.refusals

    def url(self, path: str) -> str:
        """The address of a path, for people and other programs."""
        full = self._full(path)
        return Path(full).as_uri() if self.local else str(self.fs.unstrip_protocol(full))

    def local_path(self, path: str) -> Path | None:
        """The path on this machine's disk; None where it lies elsewhere."""
        return Path(self._full(path)) if self.local else None

    def read(self, path: str) -> bytes | None:
        """A whole file; None where there is none.

        Raises:
            StorageError: the store could not be asked, or the bucket is missing.
        """
        try:
            return self.fs.cat_file(self._full(path))
        except FileNotFoundError as error:
            if drivers.bucket_is_missing(error):
                raise refused(error, self.url(path), "read") from error
            return None
        except self._refusals as error:
            raise refused(error, self.url(path), "read") from error

    def committed(self, path: str) -> bool:
        """Whether the folder is there, whole."""
        return self.read(f"{path}/{MARKER}") is not None

    def committed_folders(self, path: str) -> list[str]:
        """Names of the whole folders directly under `path`, sorted.

        Raises:
            StorageError: the store could not be asked.
        """
        return sorted(
            name for name in self._folders(path) if not name.startswith(".") and self.committed(f"{path}/{name}")
        )

    def files(self, path: str) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file directly under a folder.

        Raises:
            StorageError: the store could not be asked.
        """
        try:
            entries = self.fs.ls(self._full(path), detail=True)
            for full in sorted(entry["name"] for entry in entries if entry["type"] == "file"):
                yield full.rpartition("/")[2], self.fs.cat_file(full)
        except self._refusals as error:
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
            with self._renamed(parent, name) if self.local else self._copied(parent, name) as writer:
                yield writer
        except self._refusals as error:
            raise refused(error, self.url(target), "written") from error

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _folders(self, path: str) -> list[str]:
        """Names of the folders directly under `path`, those of writers at work included."""
        try:
            entries = self.fs.ls(self._full(path), detail=True)
        except FileNotFoundError as error:
            if drivers.bucket_is_missing(error):
                raise refused(error, self.url(path), "listed") from error
            return []
        except self._refusals as error:
            raise refused(error, self.url(path), "listed") from error
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    @contextmanager
    def _renamed(self, parent: str, name: str) -> Iterator[FolderWriter]:
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
    def _copied(self, parent: str, name: str) -> Iterator[FolderWriter]:
        self._clear_old_staging(parent)
        staging = self._full(f"{parent}/{_STAGING}{name}-{secrets.token_hex(4)}")
        try:
            yield FolderWriter(self, staging)
            self._publish(staging, f"{parent}/{name}")
        finally:
            self._clear(staging)

    def _publish(self, staging: str, target: str) -> None:
        """Copies a finished folder to its place.

        Nothing is ever deleted there: another writer of the same content may be copying, or be done. The same content
        gives the same bytes, and a file is replaced whole, so writing one again changes nothing.
        """
        if self.committed(target):
            return
        files = sorted(self.fs.find(staging), key=lambda file: file == f"{staging}/{MARKER}")
        for file in files:
            self.fs.cp_file(file, f"{self._full(target)}{file.removeprefix(staging)}")

    def _clear(self, staging: str) -> None:
        # A store that is away cannot be cleared, and why the write failed is what counts: a later writer clears it.
        with suppress(*self._refusals):
            self.fs.rm(staging, recursive=True)

    def _clear_old_staging(self, parent: str) -> None:
        for name in self._folders(parent):
            if not name.startswith(_STAGING):
                continue
            full = self._full(f"{parent}/{name}")
            with suppress(FileNotFoundError):  # another writer clears it at the same time
                written = [self.fs.modified(file).timestamp() for file in self.fs.find(full)]
                if written and max(written) < time.time() - LEFTOVER_SECONDS:
                    self.fs.rm(full, recursive=True)


def refused(error: Exception, where: str, what: str) -> StorageError:
    """The error for a disk or store that said no. `what`: "read", "written", "listed"."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space there (`cifar10 ingest` needs about 200 MB, the CSV export 250 MB more) and run it again"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        fix = "grant this user the right to it (S3: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    elif isinstance(error, FileNotFoundError) and drivers.bucket_is_missing(error):
        fix = "make the bucket, correct its name"
    else:
        fix = "check the disk or the object store (S3: AWS_ENDPOINT_URL and the keys) and run it again"
    why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return StorageError(
        f"{where} could not be {what}: {why.rstrip('.')}.", fix=f"{fix}, or set MLOPS_DATA_URL to another place."
    )


def _locked_folder(base: Path, name: str) -> tuple[Path, int]:
    """A new staging folder whose lock this process holds until it ends, however it ends."""
    while True:
        folder = base / f"{_STAGING}{name}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer took it for a dead one's, and cleared it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # it did so before the lock was held


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
