"""VGG16 for 32x32 images: its own preprocessing, Keras' convolutional base, new dense layers.

Owns the graph and the loading of weights into it; where a weights file comes from is `vgg16_weights`, and what is
frozen when is the recipe's.
"""

import keras
import numpy as np
from keras import layers

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.models.specs import Vgg16Spec
from ml.models.vgg16_weights import Weights, load_into

IMAGENET_MEAN_BGR = (103.939, 116.779, 123.68)
"""Per-channel mean of ImageNet, blue first (keras.applications.imagenet_utils, mode "caffe")."""


def build_vgg16(spec: Vgg16Spec, weights: Weights) -> keras.Model:
    """The base with `weights` and an untrained head: raw RGB 0-255 (n, 32, 32, 3) -> (n, 10) float32 probabilities.

    The base's layers stand in the model itself, not in a nested one, so that any of them can be where a frozen
    prefix ends.

    Raises:
        SourceError: the weights' file is not one of VGG16's base.
    """
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(spec.input_size, spec.input_size, 3))
    image = keras.Input(IMAGE_SHAPE, name="image", dtype="float32")
    preprocessing = preprocessing_layer()
    x = preprocessing(image)
    if spec.input_size != IMAGE_SHAPE[0]:
        x = layers.UpSampling2D(spec.input_size // IMAGE_SHAPE[0], interpolation="bilinear", name="enlarge")(x)
    for layer in base.layers[1:]:
        x = layer(x)
    if weights.path is None:
        _initialise(base)
    else:
        load_into(base, weights.path)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(spec.dense_units, activation="relu", kernel_initializer="he_normal", name="dense")(x)
    x = layers.Dropout(spec.dropout, name="dropout")(x)
    # Summed in float32, whatever the layers before compute in.
    probabilities = layers.Dense(NUM_CLASSES, activation="softmax", dtype="float32", name="probabilities")
    model = keras.Model(image, probabilities(x), name="vgg16")
    set_preprocessing(preprocessing)
    return model


def preprocessing_layer() -> layers.Layer:
    """RGB -> BGR minus ImageNet's mean, as a frozen 1x1 convolution.

    A standard layer with weights: it travels with the model, loads in Keras' safe mode without custom objects, and
    is one node of the ONNX graph.
    """
    return layers.Conv2D(3, 1, trainable=False, name="rgb_to_centred_bgr")


def set_preprocessing(layer: layers.Layer) -> None:
    """Gives a built `preprocessing_layer` its fixed values."""
    swap = np.eye(3, dtype=np.float32)[::-1].reshape(1, 1, 3, 3)
    layer.set_weights([swap, -np.asarray(IMAGENET_MEAN_BGR, dtype=np.float32)])


def _initialise(base: keras.Model) -> None:
    """He initialisation (He et al. 2015), so that thirteen plain layers with ReLU pass a signal on at all.

    Keras' default (Glorot) halves the variance at each ReLU: by the thirteenth layer 1/8192 of it is left. The first
    layer also takes the pixels' scale (about 64 around the mean) down to one.
    """
    for index, layer in enumerate(layer for layer in base.layers if isinstance(layer, layers.Conv2D)):
        kernel, bias = layer.get_weights()
        # Seeded by Keras' global seed, through the backend's random generator.
        new = keras.ops.convert_to_numpy(keras.initializers.HeNormal()(kernel.shape))
        layer.set_weights([new / 64 if index == 0 else new, np.zeros_like(bias)])
