"""From a recipe's stage to a Keras optimizer: its schedule, its decay, its rate per layer."""

from collections.abc import Sequence
from typing import Any

import keras

from ml.training.recipe import Optimizer, Stage


class _RatePerLayer:
    """Scales the learning rate of each variable (Howard & Ruder 2018, "discriminative fine-tuning").

    Scaling gradients instead would do nothing: Adam divides by their size.
    """

    factors: Sequence[float] = ()
    """One for each trainable variable, in the order that the optimizer was built with."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras calls it once per variable and step."""
        factor = self.factors[self._get_variable_index(variable)]  # type: ignore[attr-defined]  # of the optimizer
        super().update_step(gradient, variable, learning_rate * factor)  # type: ignore[misc]

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Decay is a share of the layer's own rate; Keras takes the full one for all, and would wear gentle layers."""
        if self.weight_decay is None:  # type: ignore[attr-defined]
            return
        for variable in variables:
            if self._use_weight_decay(variable):  # type: ignore[attr-defined]
                rate = self.learning_rate * self.factors[self._get_variable_index(variable)]  # type: ignore[attr-defined]
                variable.assign(variable - variable * self.weight_decay * rate)  # type: ignore[attr-defined]


class LayerwiseAdam(_RatePerLayer, keras.optimizers.Adam):  # type: ignore[misc]  # keras is untyped
    """Adam (Kingma & Ba 2015), with a rate per layer."""


class LayerwiseAdamW(_RatePerLayer, keras.optimizers.AdamW):  # type: ignore[misc]
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), with a rate per layer."""


class LayerwiseSGD(_RatePerLayer, keras.optimizers.SGD):  # type: ignore[misc]
    """Gradient descent with momentum, with a rate per layer."""


def learning_rate(stage: Stage, steps_per_epoch: int) -> Any:
    """The stage's rate: a number, or a Keras schedule over its steps."""
    warmup = round(stage.warmup_epochs * steps_per_epoch)
    steps = stage.epochs * steps_per_epoch
    first = 0.0 if warmup else stage.learning_rate
    rise = {"warmup_target": stage.learning_rate, "warmup_steps": warmup} if warmup else {}
    if stage.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(first, max(steps - warmup, 1), **rise)
    if warmup:
        # A cosine that falls to its own height: Keras' warm-up is a part of that schedule.
        return keras.optimizers.schedules.CosineDecay(first, 1, alpha=1.0, **rise)
    return stage.learning_rate


def build_optimizer(
    optimizer: Optimizer,
    stage: Stage,
    steps_per_epoch: int,
    *,
    weight_averaging: float,
    model: keras.Model,
    layers: Sequence[keras.layers.Layer],
) -> keras.optimizers.Optimizer:
    """An optimizer, built on the model's trainable weights.

    Args:
        optimizer: the recipe's.
        stage: whose rate, schedule and layer_decay it follows.
        steps_per_epoch: batches.
        weight_averaging: decay per step of the mean of the weights that it keeps; 0 for none.
        model: what is trained.
        layers: its layers with weights, from the image on; the last learns at the full rate.
    """
    shared: dict[str, Any] = {"learning_rate": learning_rate(stage, steps_per_epoch)}
    if weight_averaging:
        shared |= {"use_ema": True, "ema_momentum": weight_averaging}
    if optimizer.name == "sgd":
        made = LayerwiseSGD(
            momentum=optimizer.momentum, nesterov=True, weight_decay=optimizer.weight_decay or None, **shared
        )
    elif optimizer.name == "adamw":
        made = LayerwiseAdamW(weight_decay=optimizer.weight_decay, **shared)
    else:
        made = LayerwiseAdam(**shared)
    if optimizer.weight_decay:
        made.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    made.build(model.trainable_variables)
    learning = [layer for layer in layers if layer.trainable_variables]
    depth = {id(v): len(learning) - 1 - i for i, layer in enumerate(learning) for v in layer.trainable_variables}
    made.factors = [stage.layer_decay ** depth[id(variable)] for variable in model.trainable_variables]
    return made
