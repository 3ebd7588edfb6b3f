"""transfer_weights between subclassed, functional and Sequential models."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    images,
    numpy,
    randomize,
    sequential,
    tiny_lora_model,
    tiny_model,
    values,
)
from tfimm_lora import lora, models

both = pytest.mark.parametrize("kind", ["vit", "convnext"])


@both
def test_copies_every_weight(kind: str):
    source, target = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    before = values(source)
    models.transfer_weights(source, target)
    assert_same_bits(values(target), before)
    assert_same_bits(values(source), before)


@both
def test_lora_weights_can_be_left_out(kind: str):
    source = tiny_model(kind, seed=1)
    target = tiny_lora_model(kind, seed=2)
    factors = {p: v for p, v in values(target).items() if "_lora_" in p}
    with pytest.raises(ValueError, match=r"Missing in the source: .*kernel_lora_a"):
        models.transfer_weights(source, target)
    models.transfer_weights(source, target, weights_to_ignore=lora.LORA_WEIGHT_NAMES)
    assert_same_bits(values(target), values(source) | factors)
    models.transfer_weights(target, source, lora.LORA_WEIGHT_NAMES)


def test_ignored_weights_stay_as_they_are():
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    before = values(target)
    models.transfer_weights(source, target, [r"^blocks_0/attn", r"bias$"])
    for path, value in values(target).items():
        kept = path.startswith("blocks_0/attn") or path.endswith("bias")
        expected = before[path] if kept else values(source)[path]
        assert np.array_equal(value, expected), path


@both
def test_another_head_stays_fresh(kind: str):
    source, target = tiny_model(kind, seed=1), tiny_model(kind, seed=2, nb_classes=3)
    head = {p: v for p, v in values(target).items() if p.startswith("head") and v.shape[-1] == 3}
    assert len(head) == 2
    models.transfer_weights(source, target)
    found = values(target)
    expected = {p: v for p, v in values(source).items() if p in found and p not in head}
    assert_same_bits(found, expected | head)


@both
def test_channels_and_size_are_adapted(kind: str):
    source = tiny_model(kind)
    target = tiny_model(kind, seed=2, in_channels=1, input_size=(32, 48))
    models.transfer_weights(source, target)
    first = next(p for p in values(source) if p in ("patch_embed/proj/kernel", "stem_0/kernel"))
    np.testing.assert_allclose(
        values(target)[first], values(source)[first].sum(axis=2, keepdims=True), rtol=1e-6
    )
    # On a larger ConvNeXt image nothing but the channels matters; the ViT's table has grown.
    assert target(images(target)).shape == (3, 10)


def test_shape_mismatch_names_weight_and_shapes():
    source, target = tiny_model(mlp_ratio=4.0), tiny_model(mlp_ratio=3.0)
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.fc1.\w+' has shape .*128.*96"):
        models.transfer_weights(source, target)


def test_missing_and_surplus_weights_are_named():
    shallow, deep = tiny_model(depth=1), tiny_model(depth=2)
    with pytest.raises(ValueError, match=r"Missing in the source: blocks.1.*and \d+ more"):
        models.transfer_weights(shallow, deep)
    with pytest.raises(ValueError, match=r"Not in the model: blocks.1"):
        models.transfer_weights(deep, shallow)


def _functional(seed: int, units: int = 4) -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, name="conv_1")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return randomize(keras.Model(inputs, keras.layers.Dense(units, name="head")(x)), seed)


def test_functional_models():
    source, target = _functional(1), _functional(2)
    models.transfer_weights(source, target)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    assert np.array_equal(numpy(source(x)), numpy(target(x)))
    assert np.array_equal(values(source)["norm/moving_mean"], values(target)["norm/moving_mean"])
    with pytest.raises(ValueError, match=r"'head.\w+' has shape .*4.* in the source and .*5"):
        models.transfer_weights(source, _functional(2, units=5))
    models.transfer_weights(source, _functional(2, units=5), weights_to_ignore=["^head/"])


def test_sequential_models_and_between_the_kinds():
    def layers() -> list[keras.layers.Layer]:
        return [keras.layers.Dense(5, name="first"), keras.layers.Dense(2, name="second")]

    one, two = sequential(*layers(), shape=(3,)), sequential(*layers(), shape=(3,))
    randomize(one, 1)
    models.transfer_weights(one, two)
    assert_same_bits(values(two), values(one))
    inputs = keras.Input((3,))
    x = inputs
    for layer in layers():
        x = layer(x)
    functional = keras.Model(inputs, x)
    models.transfer_weights(one, functional)
    assert_same_bits(values(functional), values(one))


def test_models_inside_models():
    def whole(seed: int) -> keras.Model:
        inputs = keras.Input((16, 16, 3))
        features = tiny_model(nb_classes=0, seed=None)(inputs)
        return randomize(keras.Model(inputs, keras.layers.Dense(2, name="top")(features)), seed)

    source, target = whole(1), whole(2)
    assert any(p.startswith("vit/blocks_1/") for p in values(source))
    models.transfer_weights(source, target)
    assert_same_bits(values(target), values(source))
