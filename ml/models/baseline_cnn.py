"""The baseline: a plain convolutional network, trained from nothing. Its sizes are the recipe's."""

import keras
from keras import layers

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.models.specs import BaselineSpec


def build_baseline(spec: BaselineSpec) -> keras.Model:
    """An untrained model: (n, 32, 32, 3) raw RGB of 0-255 (uint8 or float32) -> (n, 10) float32 probabilities.

    A block is `convolutions_per_block` times (3x3 convolution, ReLU, batch normalisation), then 2x2 max pooling and
    dropout; after the blocks flatten, a dense layer with ReLU, dropout, and softmax.
    """
    image = keras.Input(IMAGE_SHAPE, name="image", dtype="float32")
    x = layers.Rescaling(1 / 255, name="to_0_1")(image)
    for block, filters in enumerate(spec.filters, start=1):
        for conv in range(1, spec.convolutions_per_block + 1):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"block{block}_conv{conv}")(x)
            x = layers.BatchNormalization(momentum=spec.batch_norm_momentum, name=f"block{block}_norm{conv}")(x)
        x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
        x = layers.Dropout(spec.block_dropout, name=f"block{block}_dropout")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(spec.dense_units, activation="relu", name="dense")(x)
    x = layers.Dropout(spec.dropout, name="dropout")(x)
    # Summed in float32, whatever the layers before compute in.
    probabilities = layers.Dense(NUM_CLASSES, activation="softmax", dtype="float32", name="probabilities")
    return keras.Model(image, probabilities(x), name="baseline")
