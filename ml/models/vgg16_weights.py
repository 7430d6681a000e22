"""Where VGG16's weights come from, and whether a file really holds them.

Owns the resolution of the setting `VGG16_WEIGHTS` (Keras' cache, Keras' published file, a local file, random), the
checks of a file's digest and layout, and the loading into a base. Random weights are never taken silently: they are
asked for by name or allowed as a stand-in, and are called RANDOM WEIGHTS wherever they show.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py  # type: ignore[import-untyped]
import keras

from ml.addresses import public_url
from ml.datasets.download import RetryPolicy, download
from ml.digests import file_digest
from ml.errors import ConfigurationError, SourceCorrupt, SourceError, SourceNotFound, SourceUnreachable, StorageError

logger = logging.getLogger(__name__)

IMAGENET_FILE = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{IMAGENET_FILE}"
"""Keras' own file and address (keras/src/applications/vgg16.py, WEIGHTS_PATH_NO_TOP)."""
IMAGENET_MD5 = "6d6bbae143d832006294945121d1f1fc"
RANDOM_LABEL = "RANDOM WEIGHTS"
ORIGIN_ATTRIBUTE = "cifar10_origin"
"""In a weights file that was pretrained here: what it is. Labels say it."""

_RETRIES = RetryPolicy(fruitless_attempts=2, longest_wait=1.0, connect_timeout=4.0)
"""Without a network this is known within ten seconds, at once where the address is refused."""
_OTHERWISE = (
    f"set VGG16_WEIGHTS to a local copy of {IMAGENET_FILE} (keras.applications publishes it at {IMAGENET_URL}), "
    "or to `random` to train without pre-trained layers"
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that were found. `path` and `sha256` are None exactly for random ones."""

    kind: Literal["imagenet", "file", "random"]
    path: Path | None = None
    sha256: str | None = None
    origin: str | None = None
    """Of a file that was pretrained here: what it says it is."""

    @property
    def label(self) -> str:
        """What people are told: tags, logs, tables."""
        if self.kind == "random":
            return RANDOM_LABEL
        if self.kind == "imagenet":
            return "imagenet"
        return f"{self.origin or 'file'} sha256:{(self.sha256 or '')[:12]}"


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
        SourceNotFound: the path does not exist; or the server has no such file, and no stand-in is allowed.
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
        except (SourceUnreachable, SourceNotFound) as error:
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
    return Weights("file", path, file_digest(path), _origin(path))


def _origin(path: Path) -> str | None:
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs[ORIGIN_ATTRIBUTE]) if ORIGIN_ATTRIBUTE in file.attrs else None
    except OSError:
        return None  # not HDF5: said when it is loaded, with what was expected


def _imagenet(cache_dir: Path, keras_home: Path, url: str) -> Weights:
    target = cache_dir / "vgg16" / IMAGENET_FILE
    for path in (keras_home / "models" / IMAGENET_FILE, target):
        if path.is_file():
            if file_digest(path, "md5") == IMAGENET_MD5:
                return Weights("imagenet", path, file_digest(path))
            logger.warning("%s is not the file that Keras publishes (its md5 differs); it is not used.", path)
    _download(url, target)
    return Weights("imagenet", target, file_digest(target))


def _download(url: str, target: Path) -> None:
    try:
        target.unlink(missing_ok=True)  # a download takes what lies there for complete
        download(url, target, _RETRIES, otherwise=_OTHERWISE)
        found = file_digest(target, "md5")
        if found == IMAGENET_MD5:
            return
        target.unlink()
    except OSError as error:
        raise StorageError(
            f"VGG16's weights could not be kept in {target.parent}: {error}.",
            fix="see that the folder may be written and has 59 MB of space.",
        ) from error
    raise SourceCorrupt(
        f"What {public_url(url)} sent is not VGG16's weights: md5 {found}, expected {IMAGENET_MD5}. It was deleted.",
        fix=f"try again, or look whether a proxy answers in its place; or {_OTHERWISE}.",
    )


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
