"""The same layers, computed faster: wrappers that share a layer's variables and give what it gives.

What Keras calls on TensorFlow is not always what a CPU does best. Measured on two cores:

- Batch normalisation: Keras 3 writes it as a dozen small operations, each a pass over the activations; TensorFlow has
  one fused kernel for it, forward and backward. A quarter of the baseline's step.
- 3x3 convolutions of 2x2 images (VGG16's block 5 at 32 pixels): 20 of the 36 products are with padding, and the
  convolution's kernels are made for large images. As one matrix product per output pixel nothing is wasted, and no
  convolution is left, so that XLA can compile the whole step: Adam's dozen passes over 7 million moments become one.
- XLA is good for that and for nothing with a real convolution in it: its CPU convolutions are some five times slower
  than oneDNN's. Keras' `jit_compile="auto"` takes it never on a machine with CPUs alone.
- XLA on a CPU is better at gradients and their use apart than at a whole step: in one program it folds the scattered
  gradients of the tiny convolutions into Adam's loops, and the step of VGG16's tail takes 47 ms instead of 41.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops


def follow(steps: list[layers.Layer], x: Any) -> Any:
    """The output of the layers one after the other on `x`, each in its fastest form."""
    for layer in steps:
        x = _fastest(layer, x.shape)(x)
    return x


def model_class() -> type[keras.Model]:
    """What a network that is only trained is best made as, on this backend and device."""
    return keras.Model if _compiles_anyway() else CompiledInParts


def worth_compiling(steps: list[layers.Layer], shape: tuple[int | None, ...]) -> bool:
    """Whether XLA makes a step over these layers faster, on this backend and device.

    JAX is XLA; on an accelerator XLA's convolutions are the vendor's; on a CPU see above.
    """
    if _compiles_anyway():
        return True
    for layer in steps:
        if isinstance(layer, layers.Conv2D) and not _is_tiny(layer, shape):
            return False
        shape = layer.compute_output_shape(shape)
    return True


def _compiles_anyway() -> bool:
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf  # noqa: PLC0415  # only where it is the backend

    return bool(tf.config.list_physical_devices("GPU"))


def _fastest(layer: layers.Layer, shape: tuple[int | None, ...]) -> layers.Layer:
    if isinstance(layer, layers.Conv2D) and _is_tiny(layer, shape):
        return TinyConvolution(layer)
    if type(layer) is layers.BatchNormalization and keras.backend.backend() == "tensorflow" and len(shape) == 4:
        return FusedBatchNormalization(layer)
    return layer


def _is_tiny(layer: layers.Conv2D, shape: tuple[int | None, ...]) -> bool:
    plain = layer.strides == (1, 1) and layer.dilation_rate == (1, 1) and layer.groups == 1
    return plain and layer.padding == "same" and layer.kernel_size == (3, 3) and tuple(shape[1:3]) == (2, 2)


class _Shared(layers.Layer):  # type: ignore[misc]  # keras is untyped
    """A layer that computes with another one's variables."""

    def __init__(self, layer: layers.Layer) -> None:
        super().__init__(dtype=layer.dtype_policy, name=f"fast_{layer.name}")
        self.layer = layer
        self.built = True

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """As the layer's."""
        return tuple(self.layer.compute_output_shape(shape))


class TinyConvolution(_Shared):
    """A 3x3 convolution, padded to the same size, of 2x2 images: (n, 2, 2, c) -> (n, 2, 2, filters).

    Every output pixel sees all four input pixels, each through one of the kernel's nine taps: output (i, j) is the
    flattened image times the 2x2 window of the kernel that starts at (1 - i, 1 - j).
    """

    def call(self, x: Any) -> Any:
        """x: (n, 2, 2, c)."""
        channels, filters = x.shape[-1], self.layer.filters
        kernel = ops.cast(self.layer.kernel, self.compute_dtype)
        flat = ops.reshape(x, (-1, 4 * channels))
        pixels = [
            ops.matmul(flat, ops.reshape(kernel[1 - i : 3 - i, 1 - j : 3 - j], (4 * channels, filters)))
            for i in (0, 1)
            for j in (0, 1)
        ]
        y = ops.reshape(ops.concatenate(pixels, axis=-1), (-1, 2, 2, filters))
        if self.layer.use_bias:
            y = y + ops.cast(self.layer.bias, self.compute_dtype)
        return self.layer.activation(y)


class FusedBatchNormalization(_Shared):
    """Batch normalisation over the last axis of (n, h, w, c) by TensorFlow's fused kernel, while it trains.

    The moving variance takes the batch's unbiased variance, as the kernel gives it (and as PyTorch does); Keras' own
    takes the biased one. They differ by 1 / (n h w).
    """

    def call(self, x: Any, training: bool = False) -> Any:
        """x: (n, h, w, c)."""
        norm = self.layer
        if not (training and norm.trainable and norm.scale and norm.center):
            return norm(x, training=training)
        import tensorflow as tf  # noqa: PLC0415  # made only where it is the backend

        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x,
            tf.convert_to_tensor(norm.gamma.value),
            tf.convert_to_tensor(norm.beta.value),
            epsilon=norm.epsilon,
            is_training=True,
        )
        for moving, found in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
            moving.assign(moving * norm.momentum + found * np.float32(1 - norm.momentum))
        return y


class CompiledInParts(keras.Model):  # type: ignore[misc]
    """A model that TensorFlow trains as `keras.Model` does; with `jit_compile` in two programs of XLA, not in one.

    Its batches are (x, y): weights of samples or classes are not known here, and refused by Python's unpacking.
    """

    def compile(self, *args: Any, jit_compile: bool = False, **kwargs: Any) -> None:
        """As `keras.Model.compile`, with no "auto"."""
        super().compile(*args, jit_compile=False, **kwargs)
        import tensorflow as tf  # noqa: PLC0415  # made only where it is the backend

        self._gradients = tf.function(self._loss_and_gradients, jit_compile=jit_compile)
        self._update = tf.function(self._use, jit_compile=jit_compile)
        self._judge = tf.function(self._loss_and_predictions, jit_compile=jit_compile)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One batch: its gradients, then the optimizer's step."""
        x, y = data
        loss, predicted, gradients = self._gradients(x, y)
        self._update(gradients)
        return self._measure(y, loss, predicted)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One batch of a validation."""
        x, y = data
        return self._measure(y, *self._judge(x, y))

    def _loss_and_gradients(self, x: Any, y: Any) -> tuple[Any, Any, list[Any]]:
        import tensorflow as tf  # noqa: PLC0415

        with tf.GradientTape() as tape:
            loss, predicted = self._loss_and_predictions(x, y, training=True)
            scaled = self.optimizer.scale_loss(loss)
        return loss, predicted, tape.gradient(scaled, self.trainable_weights)

    def _loss_and_predictions(self, x: Any, y: Any, training: bool = False) -> tuple[Any, Any]:
        # In one function: Keras takes a softmax's logits for the loss, and finds them only where it sees the softmax.
        predicted = self(x, training=training)
        return self.compute_loss(x, y, predicted, training=training), predicted

    def _use(self, gradients: list[Any]) -> None:
        self.optimizer.apply(gradients, self.trainable_weights)

    def _measure(self, y: Any, loss: Any, predicted: Any) -> dict[str, Any]:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=ops.shape(y)[0])  # a last batch may be smaller
            else:
                metric.update_state(y, predicted)
        return self.get_metrics_result()
