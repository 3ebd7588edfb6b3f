"""Whole models that are quantised with calibration: nearer outputs, files, formats, bad input."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    images,
    numpy,
    randomize,
    sequential,
    tiny_model,
)
from tests.quantized import all_weights, capture, packed_layers, stored
from tfimm_lora import lora, quantization
from tfimm_lora.models import create_feature_extractor
from tfimm_lora.quantization import FORMATS, calibration, gptq
from tfimm_lora.weights.names import is_lora_weight, iterate_layers, timm_path

GROUP = 16
FORMAT = {None: "int4", "gptq": "int4", "awq": "int4-row-scaled"}
each_algorithm = pytest.mark.parametrize("algorithm", ["gptq", "awq"])
each_way = pytest.mark.parametrize("way", ["lora", "regular"])


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.utils.Progbar.add", lambda *args, **kwargs: None)


def quantized(base: keras.Model, way: str, formats: Any = "int4", **options: Any) -> Any:
    """The base with kernels in formats, as a LoRA model or as a regular one."""
    if way == "regular":
        return quantization.convert_to_quantized_model(base, formats, GROUP, **options)
    model = lora.convert_to_lora_model(base, lora_train_classifier=False)
    lora.quantize(model, formats, GROUP, **options)
    return model


def formats_of(model: Any, way: str) -> Any:
    return model.cfg.quantization if way == "regular" else model.cfg.lora_quantization


def drift(model: Any, base: Any, x: np.ndarray) -> float:
    """Change of the outputs, in parts of them."""
    found, expected = numpy(model(x)), numpy(base(x))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def by_module(model: Any) -> dict[str, Any]:
    return {timm_path(path): layer for path, layer in iterate_layers(model)}


@each_way
@each_algorithm
@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.filterwarnings("ignore:Not calibrated", "ignore:The kernels of")
def test_outputs_are_nearer_and_the_model_loads_again(kind, algorithm, way, tmp_path):
    base = tiny_model(kind)
    seen, others = images(base, 16, seed=1), images(base, 16, seed=2)
    nearest = quantized(base, way)
    model = quantized(base, way, calibration=seen, algorithm=algorithm)
    assert formats_of(model, way) == FORMAT[algorithm]
    packed = packed_layers(model)
    assert len(packed) > 8 and {la.kernel.format.name for la in packed} == {FORMAT[algorithm]}
    # Of the outputs' change, 0.3 to 0.7 is left by GPTQ and 0.6 to 0.95 by AWQ.
    for x in (seen, others):
        ratio = drift(model, base, x) / drift(nearest, base, x)
        assert ratio < (0.8 if algorithm == "gptq" else 1.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(all_weights(loaded), all_weights(model))
    assert np.array_equal(numpy(loaded(others)), numpy(model(others)))
    assert formats_of(loaded, way) == FORMAT[algorithm]


def test_codes_are_those_of_gptq_on_what_each_layer_reads():
    base = tiny_model()
    x = images(base, 8)
    model = quantized(base, "regular", {"blocks.1.mlp.*": "int4", "head": "int8"}, calibration=x)
    layers, kernels = by_module(base), by_module(model)
    modules = ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "head"]
    read = capture(base, [layers[m] for m in modules], x)
    assert {id(kernels[m]) for m in modules} == {id(layer) for layer in packed_layers(model)}
    for module in modules:
        layer = layers[module]
        format = FORMATS["int8" if module == "head" else "int4"]
        matrix, hessian = numpy(layer.kernel), read[id(layer)].hessian
        expected = gptq.calibrate(format, matrix, hessian, GROUP)
        assert_same_bits(stored(kernels[module]), expected)


def test_batches_and_arrays_and_several_passes(monkeypatch):
    base = tiny_model()
    x = images(base, 12)
    formats = {"head": "int8", "blocks.*": "int4-symmetric"}
    whole = quantized(base, "lora", formats, calibration=x)
    parts = ((x[i : i + 6], None) for i in (0, 6))
    batches = quantized(base, "lora", formats, calibration=parts)
    assert drift(batches, whole, x) < 0.2 * drift(whole, base, x)
    # Layers by themselves: later ones read what earlier ones give when they are quantised.
    found = []
    original = calibration.capture_in_passes

    def in_passes(model: Any, layers: Any, *args: Any, **options: Any) -> Any:
        for part in original(model, layers, *args, **options, max_bytes=1):
            found.append(len(part))
            yield part

    monkeypatch.setattr("tfimm_lora.quantization.calibrated.capture_in_passes", in_passes)
    passes = quantized(base, "lora", formats, calibration=iter([x]))
    assert found == [1] * 9
    assert drift(passes, base, x) < drift(quantized(base, "lora", formats), base, x)


@each_way
def test_layers_that_are_not_served_are_named_and_rounded_to_nearest(way):
    base = tiny_model("convnext")
    formats = {
        "head.*": None, "stages.3.*": "nf4/16", "stages.2.*conv_dw": "int8/49", "*": "int4/16",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="Not calibrated, but rounded to nearest") as caught:
        model = quantized(base, way, formats, calibration=images(base, 4))
    (text,) = [str(w.message) for w in caught if "Not calibrated" in str(w.message)]
    assert "stages.2.blocks.0.conv_dw (each output of a depthwise" in text
    assert "stages.3.downsample.1" in text and "(nf4 is rounded to nearest always)" in text
    assert "stages.2.blocks.0.mlp" not in text and "head" not in text
    assert formats_of(model, way) == formats
    layer, plain = (by_module(m)["stages.2.blocks.0.conv_dw"] for m in (model, base))
    rounded = FORMATS["int8"].quantize(numpy(plain.kernel).reshape(49, -1), 49)
    np.testing.assert_array_equal(stored(layer)["codes"], rounded["codes"])


def test_awq_keeps_other_formats_and_group_sizes():
    base = tiny_model()
    model = lora.convert_to_lora_model(base)
    formats = {"blocks.0.*": "int8", "blocks.1.attn.*": "nf4", "blocks.1.*": "int4/8"}
    with pytest.warns(UserWarning, match="blocks.1.attn.qkv, blocks.1.attn.proj .nf4"):
        lora.quantize(model, formats, GROUP, calibration=images(base, 4), algorithm="awq")
    assert model.cfg.lora_quantization == {
        "blocks.0.*": "int8-row-scaled/16", "blocks.1.attn.*": "nf4/16",
        "blocks.1.*": "int4-row-scaled/8", "*": None,
    }  # fmt: skip
    layer = by_module(model)["blocks.1.mlp.fc1"]
    assert (layer.kernel.format.name, layer.group_size) == ("int4-row-scaled", 8)
    assert len(np.unique(stored(layer)["row_scale"])) > 1


@each_algorithm
def test_what_is_calibrated_stays_when_other_layers_are_quantised(algorithm):
    base = tiny_model()
    model = lora.convert_to_lora_model(base, lora_train_classifier=False)
    lora.quantize(model, {"blocks.*": "int4"}, GROUP, calibration=images(base), algorithm=algorithm)
    before = {la.path: stored(la) for la in packed_layers(model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not calibrated")
        lora.quantize(model, {"head": "int8"}, GROUP, calibration=images(base))
    for layer in packed_layers(model):
        if layer.path in before:
            assert_same_bits(stored(layer), before[layer.path])
    assert len(packed_layers(model)) == len(before) + 1
    with pytest.raises(ValueError, match=r"no kernel is left .* calibrate when kernels are float"):
        lora.quantize(model, {"head": "int8"}, GROUP, calibration=images(base))


@each_algorithm
def test_training_merging_and_unmerging_on_calibrated_kernels(algorithm):
    base = tiny_model()
    x = images(base, 8)
    model = lora.convert_to_lora_model(base, lora_targets="attention", lora_train_classifier=False)
    lora.quantize(model, "int4", GROUP, calibration=x, algorithm=algorithm)
    codes = {la.path: stored(la) for la in packed_layers(model)}
    randomize(model, 3, only=is_lora_weight)
    outputs = numpy(model(x))
    regular = lora.convert_to_regular_model(model)
    np.testing.assert_allclose(numpy(regular(x)), outputs, rtol=1e-4, atol=1e-4)
    # Layers without an adapter keep their codes in a quantised merge.
    with pytest.warns(UserWarning, match="were rounded again"):
        merged = lora.convert_to_regular_model(model, keep_quantized=True, calibration=x)
    assert merged.cfg.quantization is not None and len(packed_layers(merged)) == len(codes)
    assert_same_bits(
        stored(by_module(merged)["blocks.0.mlp.fc1"]), stored(by_module(model)["blocks.0.mlp.fc1"])
    )
    lora.merge_lora_weights(model)
    lora.unmerge_lora_weights(model)
    for layer in packed_layers(model):
        assert_same_bits(stored(layer), codes[layer.path])
    assert np.array_equal(numpy(model(x)), outputs)


def test_an_adapter_belongs_onto_the_codes_it_was_trained_on(tmp_path):
    base = tiny_model()
    x = images(base, 8)
    model = randomize(quantized(base, "lora", calibration=x), 3, only=is_lora_weight)
    lora.save_adapter(model, tmp_path)
    same = quantized(base, "lora", calibration=x)
    lora.load_adapter(same, tmp_path)
    assert np.array_equal(numpy(same(x)), numpy(model(x)))
    with pytest.raises(ValueError, match="the adapter was trained on other weights"):
        lora.load_adapter(quantized(base, "lora"), tmp_path)


def test_loftq_makes_up_for_what_gptq_takes():
    base = tiny_model()
    x = images(base, 8)
    fields = {"lora_train_classifier": False, "lora_init": "loftq"}
    model = lora.convert_to_lora_model(base, **fields, lora_quantization={"*": None})
    lora.quantize(model, "int4", GROUP, calibration=x)
    plain = quantized(base, "lora", calibration=x)
    assert drift(model, base, x) < drift(plain, base, x)


def test_a_functional_model_and_a_feature_extractor():
    # What reads 32 correlated values that are made of 7.
    layers = [keras.layers.Dense(n, name=f"dense_{n}") for n in (7, 32, 24)]
    base = randomize(sequential(*layers, keras.layers.Conv2D(8, 3, name="head"), shape=(7, 6, 8)))
    x = np.random.default_rng(0).standard_normal((24, 7, 6, 8)).astype("float32")
    model, nearest = (lora.convert_to_lora_model(base, lora_rank=2) for _ in range(2))
    lora.quantize(model, "int4", 12, calibration=x)
    lora.quantize(nearest, "int4", 12)
    assert drift(model, base, x) < 0.8 * drift(nearest, base, x)
    features = create_feature_extractor(tiny_model())
    small = quantization.convert_to_quantized_model(
        features, "int4", GROUP, calibration=images(features.backbone)
    )
    assert small.backbone.cfg.quantization == "int4" and packed_layers(small)


# --- Bad input --------------------------------------------------------------------------------


def untouched(model: Any, call: Any, match: str) -> None:
    """The call raises and leaves the model as it was."""
    before = all_weights(model)
    with pytest.raises(ValueError, match=match):
        call()
    assert_same_bits(all_weights(model), before)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"algorithm": "gtpq"}, r"Unknown algorithm 'gtpq'.*gptq.*Use one of gptq, awq"),
    "no images": ({"calibration": None, "algorithm": "awq"}, "no images. Pass calibration=images"),
    "float": ({"formats": None}, "nothing to choose in None"),
    "fake": ({"formats": "fake-int4"}, "nothing to choose in 'fake-int4'. It serves int8 and int4"),
    "nf4": ({"formats": {"head": None, "*": "nf4"}}, "leave calibration out for other formats"),
    "awq": ({"formats": "int4-symmetric", "algorithm": "awq"}, "serves int8 and int4; leave"),
}


@each_way
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_calibrated(case, way):
    base = tiny_model()
    options, match = BAD[case]
    options = {"formats": "int4", "calibration": images(base), **options}
    untouched(base, lambda: quantized(base, way, **options), match)


@each_way
def test_bad_images(way):
    base = tiny_model()
    good = images(base)
    for bad, match in [
        (good[:0], "no calibration data"),
        ([], "no calibration data"),
        (np.where(good > 2, np.nan, good), "not finite .* from the calibration data"),
    ]:
        untouched(base, lambda x=bad: quantized(base, way, calibration=x), match)
    model = lora.convert_to_lora_model(base)
    untouched(model, lambda: lora.quantize(model, "int4", calibration=[]), "no calibration data")


def test_trained_adapters_and_methods_that_need_zero_points():
    base = tiny_model()
    trained = randomize(lora.convert_to_lora_model(base), only=is_lora_weight)
    untouched(trained, lambda: lora.quantize(trained, "int4", calibration=images(base)), "trained")
    qalora = lora.convert_to_lora_model(base, lora_method="qalora")
    match = "qalora on int4-row-scaled: .* Use int4 .*algorithm='gptq'"
    untouched(
        qalora,
        lambda: lora.quantize(qalora, "int4", 16, calibration=images(base), algorithm="awq"),
        match,
    )
    with pytest.raises(ValueError, match=match):
        lora.convert_to_lora_model(
            base, lora_method="qalora", lora_quantization="int4-row-scaled", lora_group_size=16
        )
    lora.quantize(qalora, "int4", 16, calibration=images(base), algorithm="gptq")
    assert {la.kernel.format.name for la in packed_layers(qalora)} == {"int4"}
