"""The building blocks against plain NumPy, and what they refuse."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from tests.helpers import numpy
from tfimm_lora import layers
from tfimm_lora.layers.resample import resample_patch_kernel, resample_position_table


def batch(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    layer = layers.DropPath(0.25)
    x = np.ones((4000, 2, 3), "float32")
    assert np.array_equal(numpy(layer(x)), x)
    y = numpy(layer(x, training=True))
    per_example = y.reshape(4000, -1)
    assert set(np.unique(per_example)) <= {0.0, np.float32(1 / 0.75)}
    assert (per_example == per_example[:, :1]).all()
    assert (per_example[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert y.mean() == pytest.approx(1.0, abs=0.05)
    assert layers.DropPath(0.0).seed_generator is None
    with pytest.raises(ValueError, match=r"rate has to be in \[0, 1\), found 1.0"):
        layers.DropPath(1.0)


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "simplenorm"])
def test_normalisations(name: str):
    x = batch(2, 5, 8) * 3 + 1
    layer = layers.create_norm(name, 1e-6, "norm")
    layer.build(x.shape)
    gamma = batch(8, seed=1)
    layer.gamma.assign(gamma)
    mean, power = x.mean(-1, keepdims=True), (x**2).mean(-1, keepdims=True)
    expected = {
        "layernorm": (x - mean) / np.sqrt(x.var(-1, keepdims=True) + 1e-6),
        "rmsnorm": x / np.sqrt(power + 1e-6),
        "simplenorm": x / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6),
    }[name]
    np.testing.assert_allclose(numpy(layer(x)), expected * gamma, rtol=1e-4, atol=1e-5)


def test_global_response_norm():
    x, layer = batch(2, 3, 4, 6), layers.GlobalResponseNorm()
    assert np.allclose(numpy(layer(x)), x)  # gamma and beta start at zero
    layer.gamma.assign(np.full(6, 0.5, "float32"))
    norm = np.sqrt((x**2).sum((1, 2), keepdims=True))
    expected = x + 0.5 * x * norm / (norm.mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-5, atol=1e-6)


def test_layer_scale():
    layer = layers.LayerScale(0.3)
    x = batch(2, 4)
    np.testing.assert_allclose(numpy(layer(x)), 0.3 * x, rtol=1e-6)


def test_activations():
    x = np.linspace(-3, 3, 13, dtype="float32")
    np.testing.assert_allclose(
        numpy(layers.get_activation("quick_gelu")(ops.convert_to_tensor(x))),
        x / (1 + np.exp(-1.702 * x)),
        rtol=1e-5,
    )
    exact, fast = (numpy(layers.get_activation(n)(x)) for n in ("gelu", "gelu_tanh"))
    assert 0 < np.abs(exact - fast).max() < 1e-3
    with pytest.raises(ValueError, match=r"Unknown activation 'swish2'. Use one of gelu"):
        layers.get_activation("swish2")


def test_dense_and_convolutional_mlp_are_the_same():
    x = batch(2, 3, 4, 6)
    dense = layers.Mlp(10, 6)
    conv = layers.Mlp(10, 6, use_conv=True)
    dense.build(x.shape)
    conv.build(x.shape)
    for name in ("fc1", "fc2"):
        kernel = numpy(getattr(dense, name).kernel)
        getattr(conv, name).kernel.assign(kernel[None, None])
        getattr(conv, name).bias.assign(getattr(dense, name).bias)
    np.testing.assert_allclose(numpy(conv(x)), numpy(dense(x)), atol=1e-5)


def test_gated_mlp():
    x = batch(2, 5, 6)
    layer = layers.Mlp(8, 6, act_layer="silu", gated=True)
    layer.build(x.shape)
    assert layer.fc2.kernel.shape == (4, 6)
    gate, value = np.split(x @ numpy(layer.fc1.kernel), 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * value) @ numpy(layer.fc2.kernel)
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-5)


def test_attention_is_softmax_of_queries_and_keys():
    x = batch(2, 5, 8)
    layer = layers.Attention(8, 2)
    layer.build(x.shape)
    for weight in layer.weights:
        weight.assign(batch(*weight.shape, seed=2))
    qkv = (x @ numpy(layer.qkv.kernel) + numpy(layer.qkv.bias)).reshape(2, 5, 3, 2, 4)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / 2
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ v
    mixed = mixed.transpose(0, 2, 1, 3).reshape(2, 5, 8)
    expected = mixed @ numpy(layer.proj.kernel) + numpy(layer.proj.bias)
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="dim=10 is not a multiple of num_heads=3"):
        layers.Attention(10, 3)


def test_position_tables_keep_prefix_constants_and_slopes():
    constant = np.concatenate([batch(1, 2, 4), np.full((1, 16, 4), 3.0, "float32")], axis=1)
    resized = resample_position_table(constant, (4, 4), (6, 5), prefix=2)
    assert resized.shape == (1, 32, 4) and resized.dtype == np.float32
    assert np.array_equal(resized[:, :2], constant[:, :2])
    np.testing.assert_allclose(resized[:, 2:], 3.0, rtol=1e-6)
    slope = np.tile(np.arange(8.0, dtype="float32")[:, None], (8, 1)).reshape(1, 64, 1)
    finer = resample_position_table(slope, (8, 8), (8, 16), prefix=0).reshape(8, 16)
    np.testing.assert_allclose(np.diff(finer, axis=1)[:, 4:-4], 0.5, atol=1e-5)
    same = resample_position_table(slope, (8, 8), (8, 8), prefix=0)
    np.testing.assert_allclose(same, slope, atol=1e-6)
    tensor = resample_position_table(ops.convert_to_tensor(constant), (4, 4), (6, 5), prefix=2)
    np.testing.assert_allclose(numpy(tensor), resized, atol=1e-5)


def test_patch_kernels_keep_the_embedding_of_resized_patches():
    kernel = batch(4, 4, 3, 5)
    larger = resample_patch_kernel(kernel, (8, 8))
    flat = np.full((1, 8, 8, 3), 0.7, "float32")
    small = np.full((1, 4, 4, 3), 0.7, "float32")
    np.testing.assert_allclose(
        np.einsum("bhwc,hwco->bo", flat, larger),
        np.einsum("bhwc,hwco->bo", small, kernel),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "layer",
    [
        layers.Attention(8, 2, qkv_bias=False, qk_norm=True, attn_drop_rate=0.1, name="a"),
        layers.Mlp(8, 4, act_layer="silu", gated=True, drop_rate=0.2, name="b"),
        layers.PatchEmbed(4, 8, use_bias=False, norm_layer="rmsnorm", name="c"),
        layers.LayerScale(0.2, name="d"),
        layers.DropPath(0.2, name="e"),
        layers.GlobalResponseNorm(1e-5, name="f"),
        layers.Dropout(0.3, name="g"),
        layers.RMSNorm(1e-5, name="h"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_are_restored_from_their_config(layer: keras.layers.Layer):
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
