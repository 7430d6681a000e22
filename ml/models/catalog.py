"""From a specification to a model: the one place that knows which architecture is built how."""

import keras

from ml.errors import ConfigurationError
from ml.models.baseline_cnn import build_baseline
from ml.models.specs import BaselineSpec, Vgg16BaseSpec, Vgg16Spec
from ml.models.vgg16 import build_vgg16
from ml.models.vgg16_base import build_vgg16_base
from ml.models.vgg16_weights import Weights


def build(spec: BaselineSpec | Vgg16Spec | Vgg16BaseSpec, weights: Weights | None = None) -> keras.Model:
    """An uncompiled model: raw RGB 0-255 (n, 32, 32, 3), uint8 or float32 -> (n, 10) float32 softmax probabilities.

    Args:
        spec: which architecture, and its sizes.
        weights: the base's, for an architecture that starts from some; None for one that starts from nothing.

    Raises:
        ConfigurationError: weights for the baseline, or none for VGG16.
        SourceError: the weights' file does not fit.
    """
    if not isinstance(spec, Vgg16Spec):
        if weights is not None:
            raise ConfigurationError("This model starts from nothing, yet weights were given.", fix="give none.")
        return build_baseline(spec) if isinstance(spec, BaselineSpec) else build_vgg16_base(spec)
    if weights is None:
        raise ConfigurationError(
            "VGG16 was asked for without saying which weights.", fix="resolve VGG16_WEIGHTS first (resolve_weights)."
        )
    return build_vgg16(spec, weights)
