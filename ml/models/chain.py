"""Models that are one chain of layers, each fed by the one before: what may be cut in two, or walked through."""

import keras
from keras import layers


def chain_of(model: keras.Model) -> list[layers.Layer]:
    """The model's layers in order, without that of the input.

    Raises:
        ValueError: the model branches, joins, or uses a layer twice.
    """
    levels = list(model._nodes_by_depth.values())
    alone = all(len(level) == 1 for level in levels) and len(levels) == len(model.layers)
    if not alone or any(len(node.parent_nodes) > 1 for (node,) in levels):
        raise ValueError(f"{model.name} is not a chain of layers")
    return list(model.layers[1:])
