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

logger = logging.getLogger(__name__)


def frozen_prefix_end(model: keras.Model) -> str | None:
    """Name of the last layer of the chain before the first that learns or draws at random; None if there is none."""
    end = None
    for layer in model.layers:
        if layer.trainable_weights or isinstance(layer, layers.Dropout):
            break
        if not isinstance(layer, layers.InputLayer):
            end = layer.name
    return end


def split_at(model: keras.Model, layer_name: str) -> tuple[keras.Model, keras.Model]:
    """Two models, up to and including the layer, and behind it. They share the layers: training one trains `model`.

    Raises:
        ValueError: the model is not a chain, so that what lies behind the layer needs more than its output.
    """
    names = [layer.name for layer in model.layers]
    for layer in model.layers:
        if len(layer._inbound_nodes) == 0 or len(_feeders(model, layer)) > 1:
            raise ValueError(f"{model.name} is not a chain of layers at {layer.name}")
    cut = model.get_layer(layer_name)
    source = keras.Input(cut.output.shape[1:], dtype=cut.output.dtype, name=f"{layer_name}_features")
    x = source
    for layer in model.layers[names.index(layer_name) + 1 :]:
        x = layer(x)
    return keras.Model(model.inputs, cut.output, name=f"{model.name}_prefix"), keras.Model(source, x, name=model.name)


def _feeders(model: keras.Model, layer: layers.Layer) -> list[str]:
    own = {operation.name for operation in model.layers}
    return sorted(
        {
            parent.operation.name
            for node in layer._inbound_nodes
            for parent in node.parent_nodes
            if parent.operation.name in own
        }
    )


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
