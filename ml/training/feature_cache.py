"""Runs the frozen front of a model once per image instead of once per image and epoch.

What a frozen, deterministic layer gives for an image never changes, so training the layers behind it on stored
features is the same training as end to end, at the price of the tail alone. It holds without augmentation only:
an augmented image is a new image. The features are kept in memory: VGG16 up to block 4 is 8 KB per image,
370 MB for 45,000.
"""

import logging
import time

import keras
import numpy as np
from keras import layers

from ml.models.chain import chain_of

logger = logging.getLogger(__name__)


def split_at(model: keras.Model, layer_name: str) -> tuple[keras.Model, keras.Model]:
    """Two models, up to and including the layer, and behind it. They share the layers: training one trains `model`.

    Raises:
        ValueError: the model is not a chain, so that what lies behind the layer needs more than its output.
    """
    steps = chain_of(model)
    cut = [layer.name for layer in steps].index(layer_name) + 1
    prefix = _chain(steps[:cut], model.inputs[0], f"{model.name}_prefix")
    return prefix, _chain(steps[cut:], prefix.outputs[0], f"{model.name}_tail")


def _chain(steps: list[layers.Layer], like: keras.KerasTensor, name: str) -> keras.Model:
    """A model of these layers one after the other; its input is of the shape and dtype of `like`."""
    source = x = keras.Input(like.shape[1:], dtype=like.dtype)
    for layer in steps:
        x = layer(x)
    return keras.Model(source, x, name=name)


def extract(prefix: keras.Model, inputs: np.ndarray, *, what: str, batch_size: int = 256) -> np.ndarray:
    """The prefix's outputs in inference mode, float32 (n, ...), with a word of progress every five seconds.

    Args:
        prefix: a model of which nothing learns.
        inputs: (n, ...), what the prefix takes.
        what: named in the log.
        batch_size: images at a time.
    """
    features = np.empty((len(inputs), *prefix.output_shape[1:]), dtype=np.float32)
    began = shown = time.monotonic()
    for start in range(0, len(inputs), batch_size):
        chunk = inputs[start : start + batch_size]
        features[start : start + len(chunk)] = prefix.predict_on_batch(chunk)
        now = time.monotonic()
        if now - shown >= 5:
            shown, done = now, start + len(chunk)
            rate = done / (now - began)
            logger.info(
                "%s: %d/%d images, %.0f images/s, about %.0f s left",
                *(what, done, len(inputs), rate, (len(inputs) - done) / rate),
            )
    return features
