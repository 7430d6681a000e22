"""Finds, verifies and reads CIFAR-10: an archive, its extracted folder, a URL, or the generated stand-in.

Owns the order of trust: bytes are compared with the published md5 before anything reads their meaning. Fetching is
`download`'s, the pickle sandbox is `batch_format`'s, and whether the images make a usable dataset is `checks`'.
"""

import gzip
import hashlib
import logging
import tarfile
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from isal import igzip, igzip_lib

from ml.addresses import public_url
from ml.datasets import synthetic
from ml.datasets.batch_format import parse_batch, parse_label_names
from ml.datasets.download import RetryPolicy, download
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.raw import RawDataset
from ml.errors import (
    ConfigurationError,
    SourceCorrupt,
    SourceError,
    SourceNotFound,
    SourceUnreachable,
    StorageError,
)

logger = logging.getLogger(__name__)

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_NAME = "cifar-10-python.tar.gz"
_BY_HAND = "download it by hand, set CIFAR10_SOURCE to the file, or set CIFAR10_SOURCE=synthetic to go on without it"
_MAX_FILE_BYTES = 64 << 20
_MAX_ARCHIVE_BYTES = 1 << 30
"""The real files have 31 MB and all of them 186 MB: an archive that unpacks to more is not CIFAR-10."""


@dataclass(frozen=True)
class ArchiveLayout:
    """Which files make the dataset, and the md5 that each must have."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    md5: Mapping[str, str]


OFFICIAL_LAYOUT = ArchiveLayout(
    folder="cifar-10-batches-py",
    train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    test="test_batch",
    meta="batches.meta",
    # As published; torchvision.datasets.CIFAR10 lists the same. The archive's own checksum is not looked at,
    # because repacking it changes that and nothing that matters.
    md5=MappingProxyType(
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        }
    ),
)


def load_cifar10(
    source: str,
    cache_dir: Path,
    allow_stand_in: bool,
    *,
    layout: ArchiveLayout = OFFICIAL_LAYOUT,
    url: str = OFFICIAL_URL,
    retries: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
) -> RawDataset:
    """Resolves the setting CIFAR10_SOURCE and reads what it names.

    Args:
        source: path of the tar.gz or of the extracted folder, http(s) URL, "synthetic", or "auto": local copies
            (cache, current folder, Keras' cache), then `url`, then, only where allowed, the stand-in.
        cache_dir: where downloads are kept.
        allow_stand_in: whether "auto" may fall back to generated data; it then logs a warning that says SYNTHETIC.
        layout: the files and checksums to hold the source to.
        url: what "auto" downloads.
        retries: how patient a download is.

    Raises:
        SourceNotFound: nothing lies there.
        SourceUnreachable: the download could not be had (with "auto": and no local copy can be used).
        SourceCorrupt: a file is missing, truncated, altered, or not what its format says.
        ConfigurationError: `source` is an address of a kind that cannot be read.
    """
    if source == "synthetic":
        return synthetic.generate()
    if source == "auto":
        return _load_auto(cache_dir, allow_stand_in, layout, url, retries)
    scheme = urllib.parse.urlsplit(source).scheme if "://" in source else ""
    if scheme in ("http", "https"):
        return _load_url(source, cache_dir, layout, retries)
    if scheme not in ("", "file"):
        raise ConfigurationError(
            f"CIFAR10_SOURCE={public_url(source)!r}: cannot read from {scheme}://.",
            fix="use a path, an http(s) URL, `synthetic` or `auto`.",
        )
    path = urllib.parse.unquote(urllib.parse.urlsplit(source).path) if scheme else source
    return load_path(Path(path).expanduser(), layout)


def load_path(path: Path, layout: ArchiveLayout = OFFICIAL_LAYOUT) -> RawDataset:
    """Reads a local archive, the extracted folder, or the folder that holds it.

    Raises:
        SourceNotFound: nothing lies there.
        SourceCorrupt: as for `load_cifar10`.
    """
    logger.info("Reading CIFAR-10 from %s", path)
    try:
        if path.is_dir():
            return _assemble(_folder_files(path, layout), str(path.resolve()), layout)
        if path.is_file():
            return _assemble(_archive_files(path, layout), str(path.resolve()), layout)
    except OSError as error:
        raise StorageError(
            f"{path} could not be read: {error.strerror or error}.", fix="check the disk and the file's permissions."
        ) from error
    raise SourceNotFound(
        f"CIFAR10_SOURCE: nothing lies at {path} (looked for {path.absolute()}).",
        fix=f"set it to the path of {ARCHIVE_NAME}, to the extracted folder, to a URL, or to `auto` or `synthetic`.",
    )


def _load_auto(
    cache_dir: Path, allow_stand_in: bool, layout: ArchiveLayout, url: str, retries: RetryPolicy
) -> RawDataset:
    reasons = []
    for candidate in _local_copies(cache_dir, layout):
        # Not whatever exists: a container where no archive was given has /dev/null in its place.
        if candidate.is_file() or candidate.is_dir():
            try:
                return load_path(candidate, layout)
            except SourceCorrupt as error:
                # Keras, for one, leaves a broken download under the final name: no reason not to look further.
                logger.warning("Not using %s: %s", candidate, error.message)
                reasons.append(error.message)
    try:
        return _load_url(url, cache_dir, layout, retries)
    except SourceError as error:
        reasons.append(error.message)
        why = " ".join(reasons)
        if allow_stand_in:
            logger.warning("CIFAR-10 cannot be had (%s) Going on with SYNTHETIC images: figures mean nothing.", why)
            return synthetic.generate()
        raise SourceUnreachable(
            f"CIFAR10_SOURCE=auto found no local copy that can be used, and the download failed. {why}",
            fix=f"put {ARCHIVE_NAME} into the current folder or {cache_dir}, or set CIFAR10_SOURCE to its path, to the "
            "extracted folder, to a mirror's URL, or to `synthetic` (generated images, labelled as such).",
        ) from error


def _local_copies(cache_dir: Path, layout: ArchiveLayout) -> tuple[Path, ...]:
    keras = Path.home() / ".keras" / "datasets"
    return (
        cache_dir / ARCHIVE_NAME,
        Path(ARCHIVE_NAME),
        Path(layout.folder),
        keras / layout.folder,
        keras / f"{layout.folder}-target" / layout.folder,
        keras / f"{layout.folder}.tar.gz",
        keras / ARCHIVE_NAME,
    )


def _load_url(url: str, cache_dir: Path, layout: ArchiveLayout, retries: RetryPolicy) -> RawDataset:
    # A name of its own for each address, so that a mirror's file is never taken for another's.
    name = ARCHIVE_NAME if url == OFFICIAL_URL else f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{ARCHIVE_NAME}"
    path = download(url, cache_dir / name, retries, otherwise=_BY_HAND)
    try:
        raw = load_path(path, layout)
    except SourceCorrupt as error:
        path.unlink(missing_ok=True)
        raise SourceCorrupt(
            f"What {public_url(url)} sent is not CIFAR-10, and was deleted: {error.message}",
            fix="run it again; if it stays so, name another copy in CIFAR10_SOURCE.",
        ) from error
    return RawDataset(**{**vars(raw), "source": public_url(url)})


def _folder_files(path: Path, layout: ArchiveLayout) -> Iterator[tuple[str, bytes]]:
    folder = path / layout.folder if (path / layout.folder).is_dir() else path
    for name in layout.md5:
        file = folder / name
        if not file.is_file():
            raise SourceCorrupt(
                f"{folder} has no file {name}.",
                fix=f"extract the whole of {ARCHIVE_NAME}, or set CIFAR10_SOURCE to the archive itself.",
            )
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise _altered(file, f"{name} has {file.stat().st_size} bytes")
        yield name, file.read_bytes()


def _archive_files(path: Path, layout: ArchiveLayout) -> Iterator[tuple[str, bytes]]:
    """Streams the wanted members; nothing is ever extracted, so no member's path or link can lead anywhere."""
    wanted = {f"{layout.folder}/{name}": name for name in layout.md5}
    try:
        # isal unpacks three times as fast as zlib: 1.3 s instead of 4.
        with igzip.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.offset_data + member.size > _MAX_ARCHIVE_BYTES:
                    raise _altered(path, f"it unpacks to more than {_MAX_ARCHIVE_BYTES >> 20} MiB")
                name = wanted.get(member.name.removeprefix("./"))
                content = archive.extractfile(member) if name is not None and member.isreg() else None
                if name is None or content is None:
                    continue
                if member.size > _MAX_FILE_BYTES:
                    raise _altered(path, f"{name} has {member.size} bytes")
                del wanted[f"{layout.folder}/{name}"]
                yield name, content.read()
                if not wanted:
                    return
    # isal's stubs declare its exception class as a value.
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, igzip_lib.IsalError) as error:  # type: ignore[misc]
        raise _altered(path, f"it cannot be unpacked ({error})") from error
    raise _altered(path, f"it has no {', '.join(sorted(wanted.values()))}")


def _altered(path: Path, what: str) -> SourceCorrupt:
    return SourceCorrupt(
        f"{path} is not the CIFAR-10 archive, or is truncated or altered: {what}.",
        fix=f"fetch it again from {OFFICIAL_URL}, or set CIFAR10_SOURCE to another copy.",
    )


def _assemble(files: Iterator[tuple[str, bytes]], source: str, layout: ArchiveLayout) -> RawDataset:
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, content in files:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != layout.md5[name]:
            raise _altered(Path(source), f"{name} has md5 {found}, expected {layout.md5[name]}")
        if name != layout.meta:
            batches[name] = parse_batch(content, name)
        elif (names := parse_label_names(content, name)) != CLASS_NAMES:
            raise _altered(Path(source), f"its classes are {', '.join(names)}")
    logger.info("Verified %d files of %s by md5", len(layout.md5), source)
    test_images, test_labels = batches[layout.test]
    return RawDataset(
        data="cifar-10",
        source=source,
        train_images=np.concatenate([batches[name][0] for name in layout.train]),
        train_labels=np.concatenate([batches[name][1] for name in layout.train]),
        test_images=test_images,
        test_labels=test_labels,
        source_checksums=dict(layout.md5),
    )
