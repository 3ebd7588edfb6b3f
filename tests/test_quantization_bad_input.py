"""Bad input to quantisation: what was found, what was expected, what to type instead."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    images,
    numpy,
    randomize,
    relative_error,
    tiny_lora_model,
    tiny_model,
    trained,
)
from tests.quantized import PACKED, all_weights, packed_layers
from tfimm_lora import lora
from tfimm_lora.quantization import FORMATS
from tfimm_lora.weights.names import is_lora_weight

FIELDS: dict[str, Any] = {"lora_rank": 2, "lora_train_classifier": False}
INT4: dict[str, Any] = {"lora_quantization": "int4", "lora_group_size": 16}
# Each field of a config, and the same said to lora.quantize.
UNKNOWN = [
    ("int5", r"Unknown .*'int5'.* Did you mean .*'int[48]'.* Use None for float or one of"),
    ("fake_int8", r"Unknown .*'fake_int8'.* Did you mean .*'fake-int8'"),
    ("NF4", r"Unknown .*'NF4'.*nf4"),
    (8, "Unknown .*8.* Use None for float or one of"),
    ({"mlp.fc1": "int3", "*": "int4"}, "Unknown .*'int3'"),
]
GROUPS = [0, -1, 2.5, True, "16"]


def untrained(**fields: Any) -> keras.Model:
    return lora.convert_to_lora_model(tiny_model(), **{**FIELDS, **fields})


def refused(model: keras.Model, message: str, *arguments: Any, **options: Any) -> None:
    """``lora.quantize`` raises and changes nothing, also not in the config."""
    before, cfg, x = all_weights(model), str(model.cfg), images(model)
    outputs, flags = numpy(model(x)), trained(model)
    with pytest.raises(ValueError, match=message):
        lora.quantize(model, *arguments, **options)
    assert_same_bits(all_weights(model), before)
    assert np.array_equal(numpy(model(x)), outputs)
    assert (str(model.cfg), trained(model)) == (cfg, flags)


# --- Formats and group sizes ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "message"), UNKNOWN)
def test_formats_that_do_not_exist(name: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_quantization=name)
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(tiny_model(), lora_quantization=name)
    refused(untrained(), message, name)
    if not isinstance(name, dict):
        with pytest.raises(ValueError, match=message):
            lora.LoRADense(4, lora_quantization=name)


@pytest.mark.parametrize("size", GROUPS)
def test_a_group_size_is_a_positive_integer(size: Any):
    message = re.escape(
        f"an integer of at least 1, or None for one scale per output, found {size!r}"
    )
    with pytest.raises(ValueError, match="lora_group_size.*" + message):
        tiny_lora_model(lora_quantization="int4", lora_group_size=size)
    refused(untrained(), "group.size.*" + message, "int4", size)
    with pytest.raises(ValueError, match=message):
        lora.LoRADense(4, lora_quantization="int4", lora_group_size=size)


def test_a_group_size_needs_a_format():
    with pytest.raises(ValueError, match=r"lora_group_size=16 without lora_quantization. Name a"):
        tiny_lora_model(lora_group_size=16)
    with pytest.raises(ValueError, match="a group size of 16 needs a format"):
        lora.LoRADense(4, lora_group_size=16)


@pytest.mark.parametrize("name", PACKED)
def test_a_layer_takes_groups_that_divide_its_rows(name: str):
    layer = lora.LoRADense(5, lora_method=None, lora_quantization=name, lora_group_size=8)
    message = "group of 8 rows does not divide the 12 rows .* Use one of 1, 2, 3, 4, 6, 12, or None"
    with pytest.raises(ValueError, match=message):
        layer.build((None, 12))
    layer = lora.LoRADense(5, lora_method=None)
    layer.build((None, 12))
    before = numpy(layer.kernel)
    with pytest.raises(ValueError, match=message):
        layer.store_kernel_as(name, 8)
    assert layer.kernel_format is None and np.array_equal(numpy(layer.kernel), before)
    layer.store_kernel_as(name, 100)  # more than there are: one group
    assert layer.group_size == 12


def test_a_model_takes_groups_that_divide_some_rows():
    message = "group_size=13 divides the rows of no kernel; they have 32, 128, 192. Use .* 32"
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_quantization="int4", lora_group_size=13)
    refused(untrained(), message, "int4", 13)
    # Where it does not divide, the nearest divisor is taken.
    model = tiny_lora_model(
        lora_quantization={"patch_embed": "int4", "*": "int4"}, lora_group_size=24
    )
    assert {la.group_size for la in packed_layers(model)} == {24, 32}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.7", "'blocks.7' matches no layer with a kernel"),
        ("mlp.fc3", "'mlp.fc3' matches no layer with a kernel.*Did you mean .*mlp.fc"),
        ("norm1", "'norm1' matches no layer with a kernel"),
        ("((", r"'\(\(' matches no layer with a kernel"),
    ],
)
def test_patterns_match_something(pattern: str, message: str):
    with pytest.raises(ValueError, match="lora_quantization: " + message):
        tiny_lora_model(lora_quantization={pattern: "int4"})
    refused(untrained(), message, {pattern: "int4"})


# --- Kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PACKED)
def test_kernels_are_finite(name: str, value: float, tmp_path):
    base = tiny_model()
    kernel = numpy(base.blocks[1].mlp.fc1.kernel)
    kernel[3, 5] = value
    base.blocks[1].mlp.fc1.kernel.assign(kernel)
    size = 16 if "int4" in name else None
    message = r"blocks_1/mlp/fc1/kernel: 1 of 4096 weights are infinite or no number.*Check the"
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(base, **FIELDS, lora_quantization=name, lora_group_size=size)
    model = lora.convert_to_lora_model(base, **FIELDS)
    before = all_weights(model)
    with pytest.raises(ValueError, match=message):
        lora.quantize(model, name, size)
    assert_same_bits(all_weights(model), before)
    lora.quantize(model, {"blocks.1.mlp.fc1": None, "*": name}, size)
    assert len(packed_layers(model)) == 9


@pytest.mark.parametrize("name", PACKED)
def test_constant_kernels_are_stored(name: str):
    base = tiny_model()
    for kernel, value in (
        (base.blocks[0].mlp.fc1.kernel, 0.0),
        (base.blocks[0].mlp.fc2.kernel, 0.3),
    ):
        kernel.assign(np.full(tuple(kernel.shape), value, "float32"))
    size = 16 if "int4" in name else None
    model = lora.convert_to_lora_model(base, **FIELDS, lora_quantization=name, lora_group_size=size)
    mlp = model.blocks[0].mlp
    assert not numpy(mlp.fc1.kernel).any()
    np.testing.assert_allclose(numpy(mlp.fc2.kernel), 0.3, rtol=1e-5)
    assert np.isfinite(numpy(model(images(model)))).all()


def test_kernels_that_would_not_shrink_stay_in_float_and_are_named():
    fields = {"dims": (2, 2, 2, 2), "lora_rank": 1, "lora_train_classifier": False}
    message = r"kernels of stem.0, stages.0.blocks.0.conv_dw, .* \.\.\. stay in float: packed they"
    with pytest.warns(UserWarning, match=message):
        model = tiny_lora_model("convnext", lora_quantization="nf4", **fields)
    assert not packed_layers(model)
    model = tiny_lora_model("convnext", seed=None, **fields)
    with pytest.warns(UserWarning, match=message):
        lora.quantize(model, "nf4")
    assert not packed_layers(model)
    assert np.isfinite(numpy(model(images(model)))).all()


# --- States of a model ------------------------------------------------------------------------


def test_trained_adapters_are_in_the_way_unless_that_is_wanted():
    model = randomize(untrained(), 3, only=is_lora_weight)
    message = (
        r"'default' has been trained on the kernel as it is.*convert_to_regular.*keep_adapters"
    )
    refused(model, message, "int4", 16)
    before = numpy(model(images(model)))
    lora.quantize(model, "int4", 16, keep_adapters=True)
    assert 1e-4 < relative_error(model(images(model)), before) < 0.7


def test_merged_adapters_are_in_the_way():
    model = randomize(untrained(), 3, only=is_lora_weight)
    lora.merge_lora_weights(model)
    message = r"adapters are merged.*lora.unmerge_lora_weights\(model\) first"
    refused(model, message, "int4", 16, keep_adapters=True)
    layer = lora.lora_layers(model)[0]
    with pytest.raises(ValueError, match="unmerge the adapters before the kernel is quantised"):
        layer.store_kernel_as("int8")


def test_a_regular_model_is_converted_first():
    base = tiny_model()
    with pytest.raises(ValueError, match=r"is no LoRA model. Use lora.convert_to_lora_model"):
        lora.quantize(base, "int4")


# --- Training packed kernels ------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_kernel_is_not_trained(name: str):
    layer = lora.LoRADense(16, lora_rank=2, lora_quantization=name)
    layer.build((None, 64))
    message = rf"dense\w*/kernel is stored as {name}, so it has no gradient.* Train an adapter, or"
    with pytest.raises(ValueError, match=message):
        layer.kernel.trainable = True
    layer.kernel.trainable = False
    layer.trainable = True  # what can be trained is
    assert {v.name for v in layer.trainable_weights} >= {"kernel_lora_a", "kernel_lora_b"}
    assert not any("codes" in v.name for v in layer.trainable_weights)


@pytest.mark.parametrize("name", PACKED)
def test_full_training_needs_a_float_or_fake_kernel(name: str):
    message = f"lora_quantization='{name}': full trains all kernels.*fake-int8.*another method"
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_method="full", lora_quantization=name)
    model = untrained()
    lora.add_adapter(model, "all", lora_method="full")  # not active
    refused(model, message, name)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_modules_to_save": ("blocks.0.mlp.fc1",), "lora_targets": ("attn.q",)},
        {"lora_modules_to_save": ("blocks.0",), "lora_targets": ("blocks.1.*",)},
    ],
)
def test_a_layer_that_is_trained_in_full_is_not_packed(fields: dict):
    message = (
        "lora_quantization: 'mlp.fc1' names 'blocks.0.mlp.fc1', which is trained in full, .*int4 "
        ".*None or a fake format"
    )
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_quantization={"mlp.fc1": "int4"}, **fields)
    refused(tiny_lora_model(seed=None, **fields), message, {"mlp.fc1": "int4"})
    # For all kernels means: for all that stay as they are.
    model = tiny_lora_model(lora_quantization="int4", **fields)
    assert model.blocks[0].mlp.fc1.kernel_format is None
    assert model.blocks[0].mlp.fc1.kernel.trainable
    assert model.blocks[1].mlp.fc1.kernel_format is FORMATS["int4"]
    fake = tiny_lora_model(lora_quantization={"mlp.fc1": "fake-int4"}, **fields)
    assert fake.blocks[0].mlp.fc1.kernel.trainable


@pytest.mark.parametrize(
    ("fields", "module"),
    [
        ({"lora_rank": 2, "lora_train_classifier": True}, "head"),
        ({"lora_rank": 2, "lora_modules_to_save": ("blocks.0.mlp.fc1",),
          "lora_targets": ("attn.q",)}, "blocks.0.mlp.fc1"),
        ({"lora_method": "full"}, "patch_embed.proj"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_train_a_packed_kernel_is_not_added(fields: dict, module: str):
    model = untrained(**INT4)
    x, before = images(model), all_weights(model)
    outputs = numpy(model(x))
    message = rf"{module}.weight is stored as int4.*lora.quantize\(model, {{'{module}': None}}\)"
    with pytest.raises(ValueError, match=message):
        lora.add_adapter(model, "b", **fields)
    assert lora.adapter_names(model) == ("default",)
    assert_same_bits(all_weights(model), before)
    assert np.array_equal(numpy(model(x)), outputs)


def test_kernels_are_the_models_not_an_adapters():
    model = untrained(**INT4)
    for field, value in {**INT4, "lora_quantize_merged": True}.items():
        with pytest.raises(ValueError, match=f"{field}={value!r}: all adapters of a model share"):
            lora.add_adapter(model, "b", lora_rank=2, **{field: value})
    assert lora.adapter_names(model) == ("default",)


# --- Rounding kernel and update together ------------------------------------------------------


@pytest.mark.parametrize("name", [None, *PACKED])
def test_only_a_fake_format_rounds_kernel_and_update_together(name: str | None):
    message = "lora_quantize_merged=True rounds kernels in each step, and .* does not.*fake-int8"
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_quantization=name, lora_quantize_merged=True)
    with pytest.raises(ValueError, match=message):
        lora.LoRADense(4, lora_quantization=name, lora_quantize_merged=True)


def test_inputs_of_an_update_that_is_rounded_cannot_be_dropped():
    with pytest.raises(ValueError, match=r"lora_quantize_merged=True .* Use lora_dropout=0"):
        tiny_lora_model(lora_quantization="fake-int4", lora_quantize_merged=True, lora_dropout=0.1)


def test_examples_with_adapters_of_their_own_have_no_rounded_kernels():
    model = tiny_lora_model(lora_quantization="fake-int4", lora_quantize_merged=True, **FIELDS)
    x = images(model)
    with pytest.raises(ValueError, match="with lora_quantize_merged every adapter has a rounded"):
        model({"image": x, "adapter": lora.adapter_ids(model, ["default"] * len(x))})


# --- Files ------------------------------------------------------------------------------------


def test_a_quantised_file_does_not_go_into_a_float_model(tmp_path):
    quantized, model = untrained(**INT4), untrained()
    quantized.save_weights(tmp_path / "int4.weights.h5")
    with pytest.raises(
        ValueError, match=r"kernel in the file is packed.*lora_quantization.*or use"
    ):
        model.load_weights(tmp_path / "int4.weights.h5")
    lora.quantize(model, "int4", 16)
    model.load_weights(tmp_path / "int4.weights.h5")
    assert_same_bits(all_weights(model), all_weights(quantized))


@pytest.mark.parametrize("other", [{"lora_quantization": "int8"}, {**INT4, "lora_group_size": 8}])
def test_files_of_another_format_say_so(other: dict, tmp_path):
    untrained(**INT4).save_weights(tmp_path / "int4.weights.h5")
    with pytest.raises(
        ValueError, match=r"kernel_(codes|scale)' has shape \(\d+, \d+\) in the file"
    ):
        untrained(**other).load_weights(tmp_path / "int4.weights.h5")
