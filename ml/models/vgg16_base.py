"""VGG16's base as it is trained from nothing, and as a file of weights for `VGG16_WEIGHTS`.

Thirteen plain convolutions with ReLU hardly train from nothing in a few epochs; with batch normalisation behind each
they do (VGG16-BN). Once trained, a normalisation is a factor and a term per filter, so it folds into its convolution,
and what remains is the plain base that Keras publishes weights for.
"""

import tempfile
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
from keras import layers

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import StorageError
from ml.models.specs import VGG16_CONVOLUTIONS, Vgg16BaseSpec, norm_of
from ml.models.vgg16 import preprocessing_layer, set_preprocessing
from ml.models.vgg16_weights import ORIGIN_ATTRIBUTE

SUFFIX = ".weights.h5"


def build_vgg16_base(spec: Vgg16BaseSpec) -> keras.Model:
    """An untrained base with normalisation: raw RGB 0-255 (n, 32, 32, 3) -> (n, 10) float32 probabilities.

    He initialisation (He et al. 2015); each block is its convolutions, a normalisation and a ReLU behind each, and 2x2
    max pooling.
    """
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=IMAGE_SHAPE)
    image = keras.Input(IMAGE_SHAPE, name="image", dtype="float32")
    preprocessing = preprocessing_layer()
    x = preprocessing(image)
    for layer in base.layers[1:]:
        if not isinstance(layer, layers.Conv2D):
            x = layers.MaxPooling2D(2, name=layer.name)(x)
            continue
        x = layers.Conv2D(layer.filters, 3, padding="same", kernel_initializer="he_normal", name=layer.name)(x)
        x = layers.BatchNormalization(momentum=spec.batch_norm_momentum, name=norm_of(layer.name))(x)
        x = layers.ReLU(name=layer.name.replace("conv", "relu"))(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(spec.dropout, name="dropout")(x)
    probabilities = layers.Dense(NUM_CLASSES, activation="softmax", dtype="float32", name="probabilities")
    model = keras.Model(image, probabilities(x), name="vgg16_base")
    set_preprocessing(preprocessing)
    return model


def folded(model: keras.Model) -> keras.Model:
    """`keras.applications.VGG16(include_top=False)` with the trained base's weights, normalisations folded in.

    With y = gamma (w*x + b - mean) / sqrt(variance + epsilon) + beta, the kernel takes the factor gamma / sqrt(...) and
    the bias becomes (b - mean) times it, plus beta.
    """
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=IMAGE_SHAPE)
    for name in VGG16_CONVOLUTIONS:
        kernel, bias = model.get_layer(name).get_weights()
        norm = model.get_layer(norm_of(name))
        gamma, beta, mean, variance = norm.get_weights()
        factor = gamma / np.sqrt(variance + norm.epsilon)
        base.get_layer(name).set_weights([kernel * factor, (bias - mean) * factor + beta])
    return base


def save_base(model: keras.Model, path: Path, origin: str) -> None:
    """Writes the folded base as a notop file that `VGG16_WEIGHTS` takes, whole or not at all.

    Args:
        model: a trained one of `build_vgg16_base`.
        path: ends in .weights.h5; its folder is made if missing.
        origin: what the weights are and where they come from; every label of them will say it.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".base-") as folder:
            draft = Path(folder) / path.name
            folded(model).save_weights(draft)
            with h5py.File(draft, "r+") as file:
                file.attrs[ORIGIN_ATTRIBUTE] = origin
            draft.replace(path)
    except OSError as error:
        raise StorageError(
            f"The weights could not be written to {path}: {error}.",
            fix="free some space there, or choose another path.",
        ) from error
