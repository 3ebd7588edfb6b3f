"""Layers that store their kernel in a format: what is stored, exchanged, merged and written."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import assert_same_bits, numpy, randomize, relative_error, sequential
from tests.quantized import FAKE, PACKED, dequantized, repeated, stored
from tfimm_lora import lora
from tfimm_lora.quantization import FORMATS, StoredKernel

L = keras.layers

# Layer, input shape, and the kernel's matrix written down as in torch: rows are channel, height,
# width.
LAYERS: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
    "dense": (lambda: L.Dense(10), (None, 12), lambda k: k),
    "conv2d": (
        lambda: L.Conv2D(10, (3, 2), strides=2, padding="same"),
        (None, 7, 6, 6),
        lambda k: k.transpose(3, 2, 0, 1).reshape(10, 36).T,
    ),
    "conv2d_groups": (
        lambda: L.Conv2D(8, 3, groups=2),
        (None, 7, 6, 6),
        lambda k: k.transpose(3, 2, 0, 1).reshape(8, 27).T,
    ),
    "depthwise": (
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
        (None, 6, 6, 6),
        lambda k: k.transpose(2, 3, 0, 1).reshape(12, 9).T,
    ),
    "einsum_heads": (
        lambda: L.EinsumDense("abc,cde->abde", (None, 2, 6), bias_axes="de"),
        (None, 5, 12),
        lambda k: k.reshape(12, 12),
    ),
    "einsum_merge_heads": (
        lambda: L.EinsumDense("abcd,cde->abe", (None, 10)),
        (None, 5, 3, 4),
        lambda k: k.reshape(12, 10),
    ),
    "einsum_turned": (
        lambda: L.EinsumDense("abc,dec->abde", (None, 2, 6)),
        (None, 5, 12),
        lambda k: k.transpose(2, 0, 1).reshape(12, 12),
    ),
}
each_kind = pytest.mark.parametrize("kind", LAYERS)
each_packed = pytest.mark.parametrize("name", PACKED)
each_format = pytest.mark.parametrize("name", [*PACKED, *FAKE])


def size_of(name: str | None) -> int | None:
    return 3 if name and "int4" in name else None


def layer_of(kind: str, name: str | None, **fields: Any) -> Any:
    """A built layer with random weights, and an adapter if there is a ``lora_method``."""
    create, shape, _ = LAYERS[kind]
    lora_fields = {"lora_method": None, "lora_quantization": name, "lora_group_size": size_of(name)}
    layer = lora.convert_to_lora_layer(create(), **{**lora_fields, **fields})
    layer.build(shape)
    return layer


def kernel_of(kind: str, seed: int = 0) -> np.ndarray:
    shape = tuple(layer_of(kind, None).kernel.shape)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32") * 0.3


def inputs_of(kind: str) -> np.ndarray:
    shape = (2, *LAYERS[kind][1][1:])
    return np.random.default_rng(7).standard_normal(shape).astype("float32")


# --- What is stored ---------------------------------------------------------------------------


@each_kind
@each_packed
def test_a_kernel_is_quantised_as_a_matrix_with_rows_as_in_torch(kind: str, name: str):
    layer, kernel = layer_of(kind, name), kernel_of(kind)
    matrix = LAYERS[kind][2](kernel)
    layer.kernel.assign(kernel)
    group_size = size_of(name) or len(matrix)
    expected = FORMATS[name].quantize(np.ascontiguousarray(matrix), group_size)
    assert_same_bits(stored(layer), expected)
    assert layer.group_size == group_size
    # What the layer computes with, read with NumPy, and laid out as the kernel was.
    read = dequantized(name, stored(layer), matrix.shape, group_size)
    found = numpy(layer.kernel)
    np.testing.assert_allclose(LAYERS[kind][2](found), read, rtol=1e-6)
    assert 1e-4 < relative_error(found, kernel) < 1.5
    regular = LAYERS[kind][0]()
    regular.build(LAYERS[kind][1])
    regular.kernel.assign(found)
    if layer.bias is not None:
        regular.bias.assign(numpy(layer.bias))
    x = inputs_of(kind)
    assert relative_error(layer(x), regular(x)) <= 1e-6


@each_kind
@each_packed
def test_no_float_kernel_is_left(kind: str, name: str):
    layer = layer_of(kind, name, lora_method="lora", lora_rank=2)
    kernel, shape = layer.kernel, tuple(layer_of(kind, None).kernel.shape)
    assert isinstance(kernel, StoredKernel)
    assert (kernel.shape, kernel.dtype, kernel.trainable) == (shape, "float32", False)
    assert kernel.path.endswith("/kernel") and name in repr(kernel)
    assert {id(v) for v in kernel.variables.values()} <= {id(v) for v in layer.weights}
    assert not any(tuple(v.shape) == shape and v.dtype == "float32" for v in layer.weights)
    assert not any(v.trainable for v in kernel.variables.values())
    trained = {v.name.partition(".")[0] for v in layer.trainable_weights}
    assert trained == {"kernel_lora_a", "kernel_lora_b"}


@each_kind
def test_initial_values_are_those_of_the_float_layer_quantised(kind: str):
    keras.utils.set_random_seed(3)
    first = numpy(layer_of(kind, None).kernel)
    keras.utils.set_random_seed(3)
    layer = layer_of(kind, "int8")
    matrix = np.ascontiguousarray(LAYERS[kind][2](first))
    assert_same_bits(stored(layer), FORMATS["int8"].quantize(matrix, len(matrix)))


@each_format
def test_config_round_trip(name: str):
    layer = layer_of("dense", name, lora_method="lora", lora_rank=2)
    config = layer.get_config()
    assert (config["lora_quantization"], config["lora_group_size"]) == (name, layer.group_size)
    again = type(layer).from_config(config)
    again.build((None, 12))
    assert again.get_config() == config
    assert [v.name for v in again.weights] == [v.name for v in layer.weights]
    assert again.kernel_format is FORMATS[name]


# --- Another format in place ------------------------------------------------------------------


@each_kind
def test_formats_are_exchanged_in_place(kind: str):
    layer = layer_of(kind, None, lora_method="lora", lora_rank=2)
    matrix_of = LAYERS[kind][2]
    layer.kernel.assign(kernel_of(kind))
    names = [v.name for v in layer.weights]
    count = len(names)
    for name in ("int8", "nf4", "fake-int4", "int4", "int4-symmetric", None):
        before = numpy(layer.kernel)
        layer.store_kernel_as(name, size_of(name))
        assert layer.kernel_format is (None if name is None else FORMATS[name])
        if name in PACKED:
            matrix = np.ascontiguousarray(matrix_of(before))
            expected = FORMATS[name].quantize(matrix, size_of(name) or len(matrix))
            assert_same_bits(stored(layer), expected)
            assert len(layer.weights) == count - 1 + len(expected)
        else:  # the float kernel is what the stored one stood for
            assert numpy(layer.kernel).tobytes() == before.tobytes()
            assert [v.name for v in layer.weights] == names
        assert not layer.kernel.trainable
        assert np.isfinite(numpy(layer(inputs_of(kind)))).all()
    assert isinstance(layer.kernel, keras.Variable)


def test_codes_are_copied_between_kernels_of_one_kind_and_read_otherwise():
    source = layer_of("dense", "int4")
    source.kernel.assign(kernel_of("dense"))
    same, other = layer_of("dense", "int4"), layer_of("dense", "int4", lora_group_size=6)
    same.kernel.assign(source.kernel)
    assert_same_bits(stored(same), stored(source))
    other.kernel.assign(source.kernel)
    matrix = numpy(source.kernel)
    assert_same_bits(stored(other), FORMATS["int4"].quantize(matrix, 6))
    assert not other.kernel.same_storage(source.kernel)
    # Codes without zero points are a special case of those with them; not the other way round.
    plain = layer_of("dense", "int4-symmetric")
    plain.kernel.assign(kernel_of("dense"))
    same.kernel.assign(plain.kernel)
    assert stored(same)["codes"].tobytes() == stored(plain)["codes"].tobytes()
    np.testing.assert_array_equal(numpy(same.kernel), numpy(plain.kernel))
    plain.kernel.assign(source.kernel)
    expected = FORMATS["int4-symmetric"].quantize(numpy(source.kernel), 3)
    assert_same_bits(stored(plain), expected)


def test_a_kernel_has_one_shape():
    layer = layer_of("dense", "int8")
    with pytest.raises(ValueError, match=r"dense\w*/kernel has shape \(12, 10\) .* \(10, 12\)"):
        layer.kernel.assign(np.zeros((10, 12), "float32"))


# --- Merging ----------------------------------------------------------------------------------


def model_of(kind: str, name: str, **fields: Any) -> tuple[keras.Model, Any]:
    """A LoRA model of one layer without activation, updates not zero, and the layer."""
    create, shape, _ = LAYERS[kind]
    layer = lora.convert_to_lora_layer(
        create(),
        **{"lora_quantization": name, "lora_group_size": size_of(name), "lora_rank": 2, **fields},
    )
    model = randomize(sequential(layer, shape=shape[1:]))
    return model, layer


@each_kind
@each_packed
def test_requantised_merge_is_off_by_half_a_step_and_comes_back(kind: str, name: str):
    model, layer = model_of(kind, name, lora_method="lora")
    x, before = inputs_of(kind), stored(layer)
    outputs, wanted = numpy(model(x)), LAYERS[kind][2](numpy(layer.adapted_kernel()))
    layer.merge_weights(requantize=True)
    assert layer.merged and layer.kernel_format is FORMATS[name]
    found = LAYERS[kind][2](numpy(layer.kernel))
    if name == "nf4":
        assert np.abs(found - wanted).max() <= 0.17 * np.abs(wanted).max()
    else:
        step = repeated(stored(layer)["scale"], layer.group_size)
        assert np.all(np.abs(found - wanted) <= step * 0.50001)
    assert np.any(found != wanted)
    assert relative_error(model(x), outputs) > 1e-4
    layer.unmerge_weights()
    assert_same_bits(stored(layer), before)
    assert np.array_equal(numpy(model(x)), outputs)


@each_kind
@pytest.mark.parametrize("name", ["int4", "int8-asymmetric"])
@pytest.mark.parametrize("own", [3, 6, 9])
def test_qalora_is_merged_into_the_zero_points(kind: str, name: str, own: int):
    fields = {"lora_method": "qalora", "lora_options": {"group_size": own}}
    model, layer = model_of(kind, name, lora_group_size=3, **fields)
    assert layer.group_size == 3
    x, before = inputs_of(kind), stored(layer)
    outputs, wanted = numpy(model(x)), numpy(layer.adapted_kernel())
    layer.merge_weights(requantize=True)
    after = stored(layer)
    assert after["codes"].tobytes() == before["codes"].tobytes()
    assert after["scale"].tobytes() == before["scale"].tobytes()
    assert not np.array_equal(after["zero"], before["zero"])
    assert relative_error(numpy(layer.kernel), wanted) <= 1e-5
    assert relative_error(model(x), outputs) <= 1e-5
    layer.unmerge_weights()
    assert_same_bits(stored(layer), before)


@pytest.mark.parametrize("requantize", [False, True])
@each_packed
def test_files_of_a_merged_layer_hold_the_unmerged_state(name: str, requantize: bool, tmp_path):
    model, layer = model_of("conv2d", name, lora_method="lora")
    x = inputs_of("conv2d")
    outputs, weights = numpy(model(x)), {v.name: numpy(v) for v in layer.weights}
    layer.merge_weights(requantize=requantize)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits({v.name: numpy(v) for v in loaded.layers[-1].weights}, weights)
    # Loading into a merged layer unmerges it.
    model.load_weights(tmp_path / "model.weights.h5")
    assert not layer.merged
    assert_same_bits({v.name: numpy(v) for v in layer.weights}, weights)
    for found in (loaded, model):
        assert np.array_equal(numpy(found(x)), outputs)
