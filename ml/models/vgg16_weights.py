"""Where VGG16's weights come from, and whether a file really holds them.

Owns the resolution of the setting `VGG16_WEIGHTS` (Keras' cache, Keras' published file, a local file, random), the
checks of a file's digest and layout, and the loading into a base. Random weights are never taken silently: they are
asked for by name or allowed as a stand-in, and are called RANDOM WEIGHTS wherever they show.
"""

import hashlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py  # type: ignore[import-untyped]
import httpx
import keras

from ml.errors import ConfigurationError, SourceCorrupt, SourceError, SourceNotFound, SourceUnreachable, StorageError

logger = logging.getLogger(__name__)

IMAGENET_FILE = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{IMAGENET_FILE}"
"""Keras' own file and address (keras/src/applications/vgg16.py, WEIGHTS_PATH_NO_TOP)."""
IMAGENET_MD5 = "6d6bbae143d832006294945121d1f1fc"
RANDOM_LABEL = "RANDOM WEIGHTS"

_TIMEOUT = httpx.Timeout(20, connect=5)
_FIX_UNREACHABLE = (
    f"set VGG16_WEIGHTS to a local copy of {IMAGENET_FILE} (keras.applications publishes it at {IMAGENET_URL}), "
    "or to `random` to train without pre-trained layers."
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that were found. `path` and `sha256` are None exactly for random ones."""

    kind: Literal["imagenet", "file", "random"]
    path: Path | None = None
    sha256: str | None = None

    @property
    def label(self) -> str:
        """What people are told: tags, logs, tables."""
        if self.kind == "random":
            return RANDOM_LABEL
        return "imagenet" if self.kind == "imagenet" else f"file sha256:{(self.sha256 or '')[:12]}"


def resolve_weights(
    setting: str,
    allow_stand_in: bool,
    cache_dir: Path,
    *,
    keras_home: Path | None = None,
    url: str = IMAGENET_URL,
) -> Weights:
    """Finds the weights that `VGG16_WEIGHTS` asks for.

    Args:
        setting: `imagenet`, `random`, `auto`, or the path of a notop .h5 or .weights.h5 file.
        allow_stand_in: lets `auto` end in random weights when the download cannot be reached.
        cache_dir: downloads are kept in its `vgg16` folder.
        keras_home: Keras' folder, whose `models` is looked into first; None is ~/.keras.
        url: where the published file lies.

    Raises:
        SourceNotFound: the path does not exist.
        SourceUnreachable: the download could not be asked, and no stand-in is allowed.
        SourceCorrupt: the download is not the published file.
        ConfigurationError: the path's name is not one that Keras loads.
        StorageError: the cache could not be written.
    """
    if setting == "random":
        logger.warning("VGG16: %s, as asked; what it learns says nothing of transfer learning.", RANDOM_LABEL)
        return Weights("random")
    if setting in ("imagenet", "auto"):
        try:
            return _imagenet(cache_dir, keras_home or Path.home() / ".keras", url)
        except SourceUnreachable as error:
            if setting == "imagenet" or not allow_stand_in:
                raise
            logger.warning("VGG16: %s, because ImageNet's could not be fetched: %s", RANDOM_LABEL, error.message)
            return Weights("random")
    return _local_file(Path(setting).expanduser())


def _local_file(path: Path) -> Weights:
    if path.suffix not in (".h5", ".hdf5"):
        raise ConfigurationError(
            f"VGG16_WEIGHTS={str(path)!r} is neither imagenet, random, auto nor an .h5 file.",
            fix="give one of these words, or the path of a notop .h5 or .weights.h5 file.",
        )
    if not path.is_file():
        raise SourceNotFound(f"VGG16's weights file {path} does not exist.", fix="correct VGG16_WEIGHTS.")
    return Weights("file", path, _digest(path, "sha256"))


def _imagenet(cache_dir: Path, keras_home: Path, url: str) -> Weights:
    target = cache_dir / "vgg16" / IMAGENET_FILE
    for path in (keras_home / "models" / IMAGENET_FILE, target):
        if path.is_file():
            if _digest(path, "md5") == IMAGENET_MD5:
                return Weights("imagenet", path, _digest(path, "sha256"))
            logger.warning("%s is not the file that Keras publishes (its md5 differs); it is not used.", path)
    _download(url, target)
    return Weights("imagenet", target, _digest(target, "sha256"))


def _download(url: str, target: Path) -> None:
    """Streams the file beside `target` and moves it there only when its md5 is the published one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    except OSError as error:
        raise _no_room(target, error) from error
    part = Path(name)
    md5 = hashlib.md5(usedforsecurity=False)
    done, shown = 0, time.monotonic()
    logger.info("VGG16: fetching ImageNet's weights (59 MB) from %s", url)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            httpx.stream("GET", url, timeout=_TIMEOUT, follow_redirects=True) as reply,
        ):
            reply.raise_for_status()
            total = int(reply.headers.get("content-length", 0))
            for block in reply.iter_bytes(1 << 20):
                file.write(block)
                md5.update(block)
                done += len(block)
                if time.monotonic() - shown >= 5:
                    shown = time.monotonic()
                    logger.info("VGG16: %.0f of %.0f MB", done / 1e6, total / 1e6)
        if md5.hexdigest() != IMAGENET_MD5:
            raise SourceCorrupt(
                f"What {url} sent is not VGG16's weights: md5 {md5.hexdigest()}, expected {IMAGENET_MD5}.",
                fix="try again, or look whether a proxy answers in its place; a local file works too "
                "(VGG16_WEIGHTS=path).",
            )
        part.replace(target)
    except httpx.HTTPError as error:
        raise SourceUnreachable(
            f"VGG16's weights could not be fetched from {url}: {type(error).__name__}: {error}.", fix=_FIX_UNREACHABLE
        ) from error
    except OSError as error:
        raise _no_room(target, error) from error
    finally:
        part.unlink(missing_ok=True)


def _no_room(target: Path, error: OSError) -> StorageError:
    return StorageError(
        f"VGG16's weights could not be written under {target.parent}: {error}.", fix="free some space there (59 MB)."
    )


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def load_into(base: keras.Model, path: Path) -> None:
    """Loads a notop file into `keras.applications.VGG16(include_top=False)`, after checking that it is one.

    Args:
        base: the model to fill.
        path: the layout that Keras publishes (a group per layer, named in the attribute `layer_names`), or what
            `base.save_weights("x.weights.h5")` writes.

    Raises:
        SourceCorrupt: not HDF5, other layers, other shapes, or values that are not finite. Names what was expected.
    """
    try:
        with h5py.File(path, "r") as file:
            if "layer_names" in file.attrs or "model_weights" in file:
                _check_published_layout(base, file.get("model_weights", file), path)
            elif not path.name.endswith(".weights.h5"):
                raise _wrong(base, path, "it has no attribute `layer_names`")
        base.load_weights(path)
    except SourceError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise _wrong(base, path, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    for layer in base.layers:
        for value in layer.weights:
            if not bool(keras.ops.all(keras.ops.isfinite(value))):
                raise _wrong(base, path, f"{value.path} holds values that are not finite")


def _check_published_layout(base: keras.Model, file: h5py.Group, path: Path) -> None:
    # Keras loads this layout by position, so it would take any thirteen layers of fitting shapes: names first.
    found = {}
    for raw in file.attrs["layer_names"]:
        name = raw.decode() if isinstance(raw, bytes) else str(raw)
        weights = [w.decode() if isinstance(w, bytes) else str(w) for w in file[name].attrs["weight_names"]]
        if weights:
            found[name] = [tuple(file[name][weight].shape) for weight in weights]
    expected = {layer.name: [tuple(w.shape) for w in layer.weights] for layer in base.layers if layer.weights}
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise _wrong(
            base, path, f"it has the layers {', '.join(unknown)} (a file with the top has fc1, fc2, predictions)"
        )
    for name, shapes in expected.items():
        if found.get(name) != shapes:
            raise _wrong(
                base, path, f"{name} should have weights of shapes {shapes}, and has {found.get(name, 'none')}"
            )
    if list(found) != list(expected):
        raise _wrong(base, path, "its layers are in another order")


def _wrong(base: keras.Model, path: Path, why: str) -> SourceCorrupt:
    names = ", ".join(layer.name for layer in base.layers if layer.weights)
    return SourceCorrupt(
        f"{path} does not hold the weights of VGG16 without its top: {why}. Expected the layers {names}.",
        fix=f"use {IMAGENET_FILE} as Keras publishes it, or a file that base.save_weights('x.weights.h5') wrote.",
    )
