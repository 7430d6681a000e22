"""fsspec's drivers as `storage` needs them: what has to be asked of one kind of store and not of another.

Owns the differences between stores; what a folder is, and when it is committed, is `storage`'s.
"""

import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from ml.errors import ConfigurationError

_S3 = frozenset({"s3", "s3a"})
_HAVE_BUCKETS = _S3 | {"gs", "gcs", "abfs", "abfss", "az"}
"""Stores of flat names in buckets: making a folder there would make the bucket, a mistyped one as well."""
_S3_OPTIONS = {
    # A store that copies 180 MB answers when it has done so. Attempts are few, since s3fs repeats each of them itself.
    "config_kwargs": {"read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 3}},
}
_S3_WRITING = {"block_size": 5 * 2**30}
"""Each file in one request: of an upload in parts that is cut off, the parts stay, and nobody lists them."""


@dataclass(frozen=True)
class Driver:
    """A store, and the root under which it is used.

    `refusals`: what the driver raises when the store says no or does not answer.
    """

    fs: fsspec.AbstractFileSystem
    root: str
    protocols: frozenset[str]
    refusals: tuple[type[Exception], ...]

    @property
    def local(self) -> bool:
        """Whether it is this machine's disk."""
        return isinstance(self.fs, LocalFileSystem)

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """Opens a file for writing, in a folder that is made where the store has folders.

        An object store stores the file when the block ends well, and nothing when it raises.
        """
        if not self.protocols & _HAVE_BUCKETS:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        file = self.fs.open(path, "wb", **(_S3_WRITING if self.protocols & _S3 else {}))
        try:
            yield file
        except BaseException:
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # closing it would store what was written so far
            raise
        finally:
            file.close()


def connect(url: str) -> Driver:
    """The driver for "file:///...", a plain path, or any URL that fsspec can open. Asks the store nothing yet.

    Raises:
        ConfigurationError: fsspec does not know the URL's scheme, its driver is not installed, or the driver's own
            settings cannot be used.
    """
    if url.startswith("file://"):
        # fsspec takes file URLs literally; Path.as_uri writes a space as %20.
        url = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    scheme = url.partition("://")[0]
    refusals = _s3_refusals() if scheme in _S3 else (OSError,)
    unusable: tuple[type[Exception], ...] = (ValueError, ImportError, *refusals)
    try:
        # Drivers keep listings for the life of a process; what another process committed or deleted must be seen.
        options: dict[str, Any] = {"use_listings_cache": False} | (_S3_OPTIONS if scheme in _S3 else {})
        fs, root = fsspec.core.url_to_fs(url, **options)
        if scheme in _S3:
            fs.connect()
    except unusable as error:
        raise ConfigurationError(
            f"MLOPS_DATA_URL={url!r} cannot be opened: {error}.",
            fix="use file:///path, or install the scheme's fsspec driver (s3fs for s3://, gcsfs for gs://); "
            "AWS_ENDPOINT_URL, where it is set, is http://host:port.",
        ) from error
    protocols = frozenset({fs.protocol} if isinstance(fs.protocol, str) else fs.protocol)
    return Driver(fs, root.rstrip("/"), protocols, refusals)


def bucket_is_missing(error: Exception) -> bool:
    """Whether S3 said that there is no such bucket, which is no answer to what it holds."""
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("Error", {}).get("Code") == "NoSuchBucket"


def _s3_refusals() -> tuple[type[Exception], ...]:
    # s3fs translates what S3 answers into OSError; where there is no answer, it passes on what it got from underneath.
    try:
        from aiohttp import ClientError  # noqa: PLC0415 - of S3's driver, which only those load who use it
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415
    except ImportError:
        return (OSError,)  # the driver is not installed, which is told when it is asked for
    return (OSError, BotoCoreError, ClientError)
