"""Quantised models without adapters: made of regular ones, or by merging."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import images, numpy, randomize, relative_error, tiny_model
from tests.quantized import packed_layers, stored
from tfimm_lora import lora, quantization
from tfimm_lora.weights.names import is_lora_weight

KINDS = ["vit", "convnext"]
EXACT = {"lora_method": "qalora", "lora_options": {"group_size": 16}, "lora_group_size": 16}


def adapted(kind: str, **fields) -> keras.Model:
    """A LoRA model with an update."""
    return randomize(lora.convert_to_lora_model(tiny_model(kind), **fields), only=is_update)


def inputs(kind: str = "vit") -> np.ndarray:
    return images(tiny_model(kind))


def is_update(path: str) -> bool:
    return is_lora_weight(path.rpartition("/")[2])


@pytest.mark.parametrize(
    "format", ["int8", "int8-asymmetric", "int4", "int4-symmetric", "fake-int4"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_qa_lora_merges_into_zero_points(kind, format):
    model, x = adapted(kind, lora_quantization=format, lora_targets="all", **EXACT), inputs(kind)
    merged = lora.convert_to_regular_model(model, keep_quantized=True)
    assert relative_error(merged(x), model(x)) <= 1e-5
    assert relative_error(model(x), tiny_model(kind)(x)) > 1e-2, "no update, nothing shown"
    assert merged.merge_drift.rounded == () and merged.merge_drift.largest < 1e-4
    assert type(merged).__name__.startswith("Quantized")
    assert not any(is_lora_weight(v.path) for v in merged.weights)
    if not format.startswith("fake"):
        for one, other in zip(packed_layers(model), packed_layers(merged), strict=True):
            before, after = stored(one), stored(other)
            np.testing.assert_array_equal(before["codes"], after["codes"])
            np.testing.assert_array_equal(before["scale"], after["scale"])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_qa_lora_merges_in_place_and_back(format):
    model, x = adapted("vit", lora_quantization=format, **EXACT), inputs()
    before, weights = numpy(model(x)), [numpy(w) for w in model.weights]
    lora.merge_lora_weights(model, requantize=True)
    assert packed_layers(model), "requantize keeps the format"
    assert relative_error(model(x), before) <= 1e-5 and model.merge_drift.rounded == ()
    lora.unmerge_lora_weights(model)
    for now, then in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(numpy(now), then)


@pytest.mark.parametrize("kind", KINDS)
def test_other_updates_are_rounded_and_it_is_said(kind):
    model, x = adapted(kind, lora_quantization="int4", lora_group_size=16), inputs(kind)
    with pytest.warns(UserWarning, match=r"largest change of an output .* were rounded again"):
        merged = lora.convert_to_regular_model(model, keep_quantized=True, calibration=x)
    drift = merged.merge_drift
    expected = np.abs(numpy(merged(x)) - numpy(model(x))).max()
    assert drift.largest == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    assert (drift.images, drift.of_noise) == (len(x), False)
    assert len(drift.rounded) == len(lora.lora_layers(model))
    with pytest.warns(UserWarning, match="rounded again"):
        lora.merge_lora_weights(model, requantize=True, calibration=x)
    assert model.merge_drift.largest == pytest.approx(drift.largest, rel=1e-3)
    assert relative_error(model(x), merged(x)) <= 1e-5


@pytest.mark.parametrize("format", ["int8", "nf4", "fake-int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantise_and_merge_changes_nothing(kind, format):
    model, x = adapted(kind, lora_quantization=format), inputs(kind)
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is type(tiny_model(kind)) and not packed_layers(regular)
    assert relative_error(regular(x), model(x)) <= 1e-5


@pytest.mark.parametrize("format", ["fake-int8", "fake-int4-symmetric"])
def test_a_kernel_rounded_with_its_update_is_quantised_without_loss(format):
    model = adapted("vit", lora_quantization=format, lora_quantize_merged=True)
    merged = lora.convert_to_regular_model(model, keep_quantized=True)
    assert relative_error(merged(inputs()), model(inputs())) <= 1e-6
    assert merged.merge_drift.rounded == ()


@pytest.mark.parametrize("format", ["int8", "int4/16", "nf4", {"head": None, "*": "int4"}])
@pytest.mark.parametrize("kind", KINDS)
def test_regular_models_are_quantised(kind, format, tmp_path):
    base, x = tiny_model(kind), inputs(kind)
    small = quantization.convert_to_quantized_model(base, format)
    assert isinstance(small, type(base)) and packed_layers(small)
    # What the LoRA model of the same formats starts with.
    same = lora.convert_to_lora_model(base, lora_quantization=format, lora_train_classifier=False)
    assert relative_error(small(x), same(x)) <= 1e-5
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(small(x)))
    small.save_weights(tmp_path / "small.weights.h5")
    other = quantization.convert_to_quantized_model(tiny_model(kind, seed=3), format)
    other.load_weights(tmp_path / "small.weights.h5")
    np.testing.assert_array_equal(numpy(other(x)), numpy(small(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_adapted_again(kind):
    first = adapted(kind, lora_quantization="int4", **EXACT)
    merged = lora.convert_to_regular_model(first, keep_quantized=True)
    second = lora.convert_to_lora_model(merged, lora_rank=2)
    assert relative_error(second(inputs(kind)), merged(inputs(kind))) <= 1e-6
    for one, other in zip(packed_layers(merged), packed_layers(second), strict=True):
        for name, value in stored(one).items():
            np.testing.assert_array_equal(value, stored(other)[name])


def test_functional_models(tmp_path):
    layers = keras.layers
    base = randomize(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(16, 3, name="first"),
                layers.DepthwiseConv2D(3, name="second"),
                layers.Flatten(),
                layers.Dense(10, name="head"),
            ]
        )
    )
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("float32")
    model = lora.convert_to_lora_model(base, lora_quantization="int4", **EXACT)
    randomize(model, only=is_update)
    merged = lora.convert_to_regular_model(model, keep_quantized=True)
    assert relative_error(merged(x), model(x)) <= 1e-5 and len(packed_layers(merged)) == 3
    merged.save(tmp_path / "merged.keras")
    loaded = keras.models.load_model(tmp_path / "merged.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(merged(x)))


def test_a_composite_layer_stays_in_float():
    inputs = keras.Input((4, 16))
    outputs = keras.layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    model = lora.convert_to_lora_model(keras.Model(inputs, outputs), lora_quantization="int8")
    with pytest.raises(ValueError, match=r"attention.* lies inside a composite layer"):
        lora.convert_to_regular_model(model, keep_quantized=True)


def test_feature_extractors():
    base = tfimm_lora.create_feature_extractor(tiny_model("convnext"))
    small = quantization.convert_to_quantized_model(base, "int8")
    for found, expected in zip(small(inputs("convnext")), base(inputs("convnext")), strict=True):
        assert relative_error(found, expected) < 0.2


def test_bad_input():
    model = adapted("vit")
    with pytest.raises(ValueError, match=r"no kernel of the model is quantised.*lora\.quantize"):
        lora.convert_to_regular_model(model, keep_quantized=True)
    model = adapted("vit", lora_quantization="int8")
    with pytest.raises(ValueError, match="calibration has no images"):
        lora.convert_to_regular_model(model, True, inputs()[:0])
    lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="unmerge_lora_weights"):
        lora.convert_to_regular_model(model, keep_quantized=True)
    with pytest.raises(ValueError, match="'fake-int8' is for training"):
        quantization.convert_to_quantized_model(tiny_model("vit"), "fake-int8")
    with pytest.raises(ValueError, match="is for training"):
        quantization.QuantizedDense(3, quantization="fake-int4")
    with pytest.raises(ValueError, match="quantization: 'haed' matches no layer"):
        quantization.convert_to_quantized_model(tiny_model("vit"), {"haed": "int8"})
    with pytest.raises(ValueError, match="Dense has no quantised variant"):
        quantization.quantized_architecture(keras.layers.Dense)
    with pytest.raises(ValueError, match="is not registered as quantised variant"):
        quantization.quantized_base_architecture(keras.layers.Dense)
