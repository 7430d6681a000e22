"""Runs the frozen front of a model once per image instead of once per image and epoch, and keeps what it gives.

What a frozen, deterministic layer gives for an image never changes, so training the layers behind it on stored
features is the same training as end to end, at the price of the tail alone. With augmentation it holds for each view
of an image: a recipe with `views` fixes some per image, and each is stored.

The features are files under a folder, memory-mapped, named by what they were made of (the layers' weights, the images,
the view): found again by the next training, dropped when others need the room, least recently used first.
VGG16 up to block 4 is 8 KB per image and view, 370 MB for 45,000.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from keras import layers

from ml.errors import ConfigurationError, StorageError

logger = logging.getLogger(__name__)


class FeatureCache:
    """A folder of arrays by key, bounded in bytes."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes

    def array(self, key: str, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> np.ndarray:
        """The float32 array of this key, read-only and memory-mapped; made by `fill` where it is not there yet.

        Args:
            key: hex digits that name the content.
            shape: of the array.
            fill: writes the whole array into the one it is given. Cut off, it leaves nothing behind that is used.

        Raises:
            ConfigurationError: the array alone is larger than the budget.
            StorageError: the folder cannot be written.
        """
        path = self.folder / f"{key}.npy"
        try:
            found = self._open(path, shape)
            if found is None:
                self._make(path, shape, fill)
                found = self._open(path, shape)
            if found is None:
                raise OSError(f"{path.name} was gone or torn as soon as it was written")
            return found
        except OSError as error:
            raise StorageError(
                f"Features could not be kept in {self.folder}: {error}.",
                fix="free some space there; the folder may be deleted at any time.",
            ) from error

    def refuse_unless_it_holds(self, size: int) -> None:
        """Raises ConfigurationError where so many bytes of features, needed at one time, exceed the budget."""
        if size > self.budget_bytes:
            raise ConfigurationError(
                f"This stage needs {size / 2**30:.1f} GiB of features at one time, and FEATURE_CACHE_GIB allows "
                f"{self.budget_bytes / 2**30:.1f}.",
                fix="raise FEATURE_CACHE_GIB, lower the recipe's augmentation.views, or train on fewer images.",
            )

    def _open(self, path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
        """The array in the file; None where there is none, or none that is whole."""
        try:
            found = np.load(path, mmap_mode="r")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):  # what NumPy raises depends on where a file is torn
            found = None
        if found is not None and found.shape == shape and found.dtype == np.float32:
            return found
        logger.warning("%s is torn or of another shape; it is made anew", path)
        path.unlink(missing_ok=True)
        return None

    def _make(self, path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
        size = 4 * int(np.prod(shape))
        self.refuse_unless_it_holds(size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        try:
            array = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float32, shape=shape)
            with draft.open("r+b") as file:
                # All of it now: a mapped page that finds the disk full ends the process, and this raises.
                os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
            fill(array)
            array.flush()
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Deletes the least recently used, and drafts whose process was killed. Who maps a deleted file keeps it."""
        for draft in self.folder.glob("*.draft"):
            if not Path(f"/proc/{draft.suffixes[-2][1:]}").exists():
                draft.unlink(missing_ok=True)
        kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.npy"))
        used = sum(bytes_ for _, bytes_, _ in kept)
        used += sum(draft.stat().st_size for draft in self.folder.glob("*.draft"))  # being filled, perhaps from these
        for _, bytes_, path in kept:
            if used + size <= self.budget_bytes:
                break
            logger.info("dropping %s, the least recently used features", path.name)
            path.unlink(missing_ok=True)
            used -= bytes_


def digest_of_layers(steps: Iterable[layers.Layer]) -> str:
    """sha256 over the layers' kinds, settings and weights, hex."""
    digest = hashlib.sha256()
    for layer in steps:
        config = {key: value for key, value in layer.get_config().items() if key not in ("trainable", "dtype")}
        digest.update(f"{type(layer).__name__} {config}".encode())
        for weight in layer.get_weights():
            digest.update(np.ascontiguousarray(weight).data)
    return digest.hexdigest()


def digest_of_array(array: np.ndarray) -> str:
    """sha256 over an array's content, hex."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def key_of(*parts: str) -> str:
    """A file name, 32 hex digits, out of digests and words."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many images are done; logs a word at most every five seconds, and the end."""
    began = shown = time.monotonic()

    def tell(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 5 and done < total:
            shown, rate = now, done / (now - began)
            logger.info(
                "%s: %d/%d images, %.0f images/s, about %.0f s left", what, done, total, rate, (total - done) / rate
            )

    yield tell
    seconds = time.monotonic() - began
    logger.info("%s: %d images in %.1f s, %.0f images/s", what, total, seconds, total / max(seconds, 1e-9))
