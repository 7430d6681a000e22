"""The fast layers compute what Keras' own do: forward, backward, and the statistics they move."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from ml.training import kernels
from ml.training.kernels import CompiledInParts, FusedBatchNormalization, TinyConvolution, follow, worth_compiling

tf = pytest.importorskip("tensorflow")

RNG = np.random.default_rng(0)


def gradients(layer: layers.Layer, x: np.ndarray, variables: list[Any], **call: Any) -> list[np.ndarray]:
    """Of a sum that weighs every output differently: with respect to the input, then to the variables."""
    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = tf.cast(layer(given, **call), tf.float32)
        weights = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
        total = tf.reduce_sum(y * weights)
    return [np.asarray(g) for g in tape.gradient(total, [given, *(variable.value for variable in variables)])]


def agree(one: list[np.ndarray], other: list[np.ndarray], tolerance: float = 1e-4) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_a_tiny_convolution_is_the_convolution(bias: bool, activation: str) -> None:
    keras.utils.set_random_seed(1)
    conv = layers.Conv2D(
        7, 3, padding="same", activation=activation, use_bias=bias, bias_initializer="random_normal", name="conv"
    )
    conv.build((None, 2, 2, 5))
    fast = TinyConvolution(conv)
    x = RNG.normal(size=(6, 2, 2, 5)).astype(np.float32)
    assert np.allclose(fast(x), conv(x), atol=1e-5)
    agree(gradients(fast, x, conv.trainable_variables), gradients(conv, x, conv.trainable_variables))
    assert [id(v) for v in fast.trainable_variables] == [id(v) for v in conv.trainable_variables]
    assert fast.compute_output_shape((None, 2, 2, 5)) == (None, 2, 2, 7)
    conv.trainable = False
    assert fast.trainable_variables == []


@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_fused_normalisation_is_keras_own_while_it_trains(momentum: float) -> None:
    keras.utils.set_random_seed(1)
    slow, norm = (
        layers.BatchNormalization(momentum=momentum, gamma_initializer="random_normal", beta_initializer="ones")
        for _ in range(2)
    )
    for layer in (slow, norm):
        layer.build((None, 3, 4, 5))
    norm.set_weights(slow.get_weights())
    fast = FusedBatchNormalization(norm)
    for step in range(3):
        x = RNG.normal(2, 3, size=(6, 3, 4, 5)).astype(np.float32)
        assert np.allclose(fast(x, training=True), slow(x, training=True), atol=1e-4)
        n = 6 * 3 * 4
        before = momentum**step  # what is left of the first variance of one
        unbiased = before * momentum + (np.asarray(slow.moving_variance) - before * momentum) * n / (n - 1)
        assert np.allclose(norm.moving_mean, slow.moving_mean, atol=1e-5)
        assert np.allclose(norm.moving_variance, unbiased, rtol=1e-4)
    agree(
        gradients(fast, x, [norm.gamma, norm.beta], training=True),
        gradients(slow, x, [slow.gamma, slow.beta], training=True),
        1e-3,
    )


def test_fused_normalisation_is_exactly_keras_own_where_nothing_is_learned() -> None:
    norm = layers.BatchNormalization(gamma_initializer="random_normal")
    norm.build((None, 3, 4, 5))
    norm.moving_mean.assign(RNG.normal(size=5))
    norm.moving_variance.assign(RNG.uniform(0.5, 2, size=5))
    fast = FusedBatchNormalization(norm)
    x = RNG.normal(size=(6, 3, 4, 5)).astype(np.float32)
    before = [np.asarray(v) for v in norm.variables]
    assert np.array_equal(fast(x, training=False), norm(x, training=False))
    norm.trainable = False
    assert np.array_equal(fast(x, training=True), norm(x, training=False))
    assert all(np.array_equal(a, b) for a, b in zip(before, norm.variables, strict=True)), "statistics moved"


def test_normalisation_without_scale_or_shift_is_left_to_keras() -> None:
    norm = layers.BatchNormalization(scale=False)
    norm.build((None, 3, 4, 5))
    x = RNG.normal(size=(6, 3, 4, 5)).astype(np.float32)
    y = np.asarray(FusedBatchNormalization(norm)(x, training=True))
    assert np.allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-4)


def conv(size: int = 3, **options: Any) -> layers.Layer:
    return layers.Conv2D(4, size, **({"padding": "same"} | options))


def test_only_what_is_the_same_is_replaced() -> None:
    def kinds(step: layers.Layer, shape: tuple[int, ...]) -> str:
        source = keras.Input(shape)
        return type(keras.Model(source, follow([step], source)).layers[-1]).__name__

    assert kinds(conv(), (2, 2, 3)) == "TinyConvolution"
    assert kinds(conv(), (4, 4, 3)) == "Conv2D"
    assert kinds(conv(1), (2, 2, 3)) == "Conv2D"
    for options in ({"strides": 2}, {"dilation_rate": 2}, {"groups": 2}):
        assert kinds(conv(**options), (2, 2, 4)) == "Conv2D"
    assert kinds(conv(2, padding="valid"), (2, 2, 3)) == "Conv2D"
    assert kinds(layers.BatchNormalization(), (4, 4, 3)) == "FusedBatchNormalization"
    assert kinds(layers.BatchNormalization(), (7,)) == "BatchNormalization"


def test_a_step_is_compiled_where_no_convolution_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: [])
    dense = [layers.Flatten(), layers.Dense(3)]
    assert worth_compiling(dense, (None, 4, 4, 3))
    assert not worth_compiling([conv(), *dense], (None, 4, 4, 3))
    assert worth_compiling([conv(), conv(), layers.MaxPooling2D(), *dense], (None, 2, 2, 3))
    # What counts is the size that reaches the layer.
    assert worth_compiling([layers.MaxPooling2D(), conv(), *dense], (None, 4, 4, 3))
    assert not worth_compiling([conv(), layers.MaxPooling2D(), conv()], (None, 4, 4, 3))
    assert not worth_compiling([conv(1)], (None, 2, 2, 3))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["an accelerator"])
    assert worth_compiling([conv(), *dense], (None, 4, 4, 3))
    monkeypatch.setattr(kernels.keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: [])
    assert worth_compiling([conv(), *dense], (None, 4, 4, 3))


@pytest.mark.parametrize(("xla", "precision"), [(False, "float32"), (True, "float32"), (True, "mixed_float16")])
def test_a_model_compiled_in_parts_trains_as_keras_does(xla: bool, precision: str) -> None:
    # In single precision the last batch is smaller, which is a program more to compile.
    x = RNG.normal(size=(50 if precision == "float32" else 64, 2, 2, 4)).astype(np.float32)
    # Labels that it learns to be sure of, and validates on the opposite: the loss of what it holds impossible is large
    # and comes from the logits.
    y = (x.mean(axis=(1, 2, 3)) > 0).astype(np.int64)

    def trained(kind: type[keras.Model]) -> tuple[dict[str, list[float]], list[np.ndarray]]:
        keras.utils.set_random_seed(3)
        source = keras.Input((2, 2, 4))
        dense = layers.Dense(32, activation="relu", dtype=precision)
        middle = layers.Dropout(0.2, seed=5, dtype=precision)(dense(layers.Flatten()(source)))
        model = kind(source, layers.Dense(2, activation="softmax", dtype="float32")(middle))
        adam: Any = keras.optimizers.AdamW(0.03, weight_decay=0.01, use_ema=True)
        if precision == "mixed_float16":
            adam = keras.optimizers.LossScaleOptimizer(adam)
        model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=xla)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
        opposite = tf.data.Dataset.from_tensor_slices((10 * x, 1 - y)).batch(32)
        history = model.fit(data, epochs=4, validation_data=opposite, verbose=0).history
        return history, model.get_weights()

    (ours, weights), (keras_own, expected) = trained(CompiledInParts), trained(keras.Model)
    assert keras_own["val_loss"][-1] > 10
    assert ours.keys() == keras_own.keys()
    for name, values in keras_own.items():
        assert ours[name] == pytest.approx(values, rel=1e-4 if precision == "float32" else 0.02), name
    agree(weights, expected, 1e-4 if precision == "float32" else 0.02)
