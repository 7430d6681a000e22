"""Builds archives of the official layout out of generated images, so that no test needs the real ones."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from ml.datasets.cifar10 import OFFICIAL_LAYOUT, ArchiveLayout
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.synthetic import generate

FOLDER = OFFICIAL_LAYOUT.folder


def batch(images: np.ndarray, labels: object) -> bytes:
    """A batch file: planes of red, green and blue, as the official ones have them."""
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return pickle.dumps({b"batch_label": b"a batch", b"labels": labels, b"data": planes, b"filenames": []}, protocol=2)


def batch_files(train: int = 200, test: int = 50, seed: int = 0) -> dict[str, bytes]:
    """All files of a small archive: {name: content}."""
    raw = generate(train, test, seed)
    files = {}
    for name, rows in zip(OFFICIAL_LAYOUT.train, np.array_split(np.arange(train), 5), strict=True):
        files[name] = batch(raw.train_images[rows], raw.train_labels[rows].tolist())
    files[OFFICIAL_LAYOUT.test] = batch(raw.test_images, raw.test_labels.tolist())
    names = [name.encode() for name in CLASS_NAMES]
    files[OFFICIAL_LAYOUT.meta] = pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2)
    return files


def layout_of(files: dict[str, bytes]) -> ArchiveLayout:
    """The official layout with these files' checksums."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return ArchiveLayout(FOLDER, OFFICIAL_LAYOUT.train, OFFICIAL_LAYOUT.test, OFFICIAL_LAYOUT.meta, md5)


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            add_member(archive, f"{FOLDER}/{name}", content)
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    folder = path / FOLDER
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
