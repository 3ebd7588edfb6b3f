"""Formats of kernels as matrices: codes, scales and zeros of others, bounds, packing, bytes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import numpy
from tests.quantized import (
    FAKE,
    PACKED,
    convnext_tiny,
    dequantized,
    nf4_scales,
    repeated,
    vit_small,
)
from tfimm_lora.quantization import (
    FORMATS,
    NF4,
    IntegerFormat,
    kernel_format,
    pack_nibbles,
    unpack_nibbles,
)
from tfimm_lora.quantization.group_size import fitted_group_size
from tfimm_lora.quantization.nf4 import NF4_VALUES, dynamic_values

each_packed = pytest.mark.parametrize("name", PACKED)
INTEGER = tuple(name for name in PACKED if isinstance(FORMATS[name], IntegerFormat))
EPSILON = np.float32(1e-7)


def matrix(rows: int = 48, outputs: int = 20, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    """Both signs in each group, with an outlier here and there."""
    values = np.random.default_rng(seed).standard_t(3, size=(rows, outputs)) * scale
    values[::6] = np.abs(values[::6])
    values[3::6] = -np.abs(values[3::6])
    return values.astype("float32")


def stored(name: str, values: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    return FORMATS[name].quantize(values, group_size)


def read(name: str, tensors: dict[str, np.ndarray], shape: Any, group_size: int) -> np.ndarray:
    return numpy(FORMATS[name].dequantize(tensors, shape, group_size))


def signed(name: str, tensors: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """Codes as Keras has them."""
    if name.startswith("int8"):
        return tensors["codes"]
    return numpy(unpack_nibbles(tensors["codes"], rows)).astype("int8") - 8


# --- Keras' quantisers ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values"), [("int8", (-127, 127)), ("int4-symmetric", (-8, 7))])
@pytest.mark.parametrize("group_size", [48, 16, 6])
def test_symmetric_codes_and_scales_are_those_of_keras(name, values, group_size):
    x = matrix()
    groups = x.reshape(-1, group_size, x.shape[1])
    codes, inverse = keras.quantizers.abs_max_quantize(groups, 1, values, to_numpy=True)
    found = stored(name, x, group_size)
    np.testing.assert_array_equal(signed(name, found, len(x)), numpy(codes).reshape(x.shape))
    # Keras stores what codes are divided by.
    largest = np.abs(groups).max(axis=1) + EPSILON
    assert (np.float32(values[1]) / largest).tobytes() == numpy(inverse)[:, 0].tobytes()
    assert found["scale"].tobytes() == (largest / np.float32(values[1])).tobytes()
    assert set(found) == {"codes", "scale"}


@pytest.mark.parametrize(("name", "values"), [("int8-asymmetric", (-128, 127)), ("int4", (-8, 7))])
@pytest.mark.parametrize("group_size", [48, 16, 6])
def test_asymmetric_codes_scales_and_zeros_are_those_of_keras(name, values, group_size):
    x = matrix()
    codes, scale, zero = (
        numpy(t)
        for t in keras.quantizers.abs_max_quantize_grouped_with_zero_point(
            x, group_size, values, to_numpy=True
        )
    )
    found = stored(name, x, group_size)
    np.testing.assert_array_equal(signed(name, found, len(x)), codes)
    assert found["scale"].tobytes() == scale.tobytes()
    offset = 8 if values[1] == 7 else 0
    assert found["zero"].dtype == np.float32
    np.testing.assert_array_equal(found["zero"] - offset, zero)
    assert len(np.unique(zero)) > 3, "zero points that are all alike show nothing"


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_two_codes_share_a_byte_as_in_keras(rows: int):
    codes = np.random.default_rng(0).integers(0, 16, size=(rows, 5)).astype("uint8")
    packed = pack_nibbles(codes)
    theirs, _, _ = keras.quantizers.pack_int4(codes, axis=0, dtype="uint8")
    assert packed.dtype == np.uint8 and packed.shape == ((rows + 1) // 2, 5)
    np.testing.assert_array_equal(packed, numpy(theirs))
    np.testing.assert_array_equal(numpy(unpack_nibbles(packed, rows)), codes)
    unpacked = keras.quantizers.unpack_int4(packed, rows, axis=0, dtype="uint8")
    np.testing.assert_array_equal(numpy(unpacked), codes)


# --- What is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize(("rows", "group_size"), [(48, 48), (48, 16), (49, 49), (49, 7), (1, 1)])
def test_an_integer_is_off_by_half_a_step_at_most(name, rows, group_size):
    x = matrix(rows)
    found = stored(name, x, group_size)
    assert found["scale"].shape == (rows // group_size, x.shape[1])
    error = np.abs(read(name, found, x.shape, group_size) - x.astype("float64"))
    step = repeated(found["scale"], group_size)
    assert np.all(error <= step * 0.500001)
    assert rows == 1 or error.max() > 0.4 * step.min()


@pytest.mark.parametrize("group_size", [48, 16])
def test_nf4_takes_the_nearest_of_its_values(group_size):
    x = matrix(48, 70)
    found = stored("nf4", x, group_size)
    groups = x.reshape(-1, group_size, 70)
    largest = np.abs(groups).max(axis=1)
    # First level: the nearest of 16, against the unrounded scale.
    codes = numpy(unpack_nibbles(found["codes"], 48)).reshape(groups.shape)
    normal = groups.astype("float64") / largest[:, None]
    distance = np.abs(normal[..., None] - NF4_VALUES.astype("float64"))
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(axis=-1), atol=1e-7)
    # Second level: the nearest of 256 in blocks of 256 of (outputs, groups).
    flat = largest.T.reshape(-1)
    blocks = np.pad(flat - found["absmax_mean"], (0, -len(flat) % 256)).reshape(-1, 256)
    assert found["absmax_mean"] == pytest.approx(flat.mean(), rel=1e-6)
    np.testing.assert_array_equal(found["absmax_scale"], np.abs(blocks).max(axis=1))
    normal = blocks.astype("float64") / found["absmax_scale"][:, None]
    distance = np.abs(normal[..., None] - dynamic_values().astype("float64"))
    chosen = np.take_along_axis(distance, found["absmax"][..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(axis=-1), atol=1e-7)
    scales = nf4_scales(found, 48, 70, group_size)
    assert np.abs(scales - largest).max() <= 0.01 * largest.max()


@each_packed
@pytest.mark.parametrize(("rows", "group_size"), [(48, 48), (48, 16), (49, 49), (49, 7), (1, 1)])
def test_what_is_read_is_what_the_stored_numbers_say(name, rows, group_size):
    x = matrix(rows, 70)
    found = stored(name, x, group_size)
    expected = dequantized(name, found, x.shape, group_size)
    values = read(name, found, x.shape, group_size)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", FAKE)
@pytest.mark.parametrize(("rows", "group_size"), [(48, 48), (48, 16), (49, 7)])
def test_a_fake_value_is_the_packed_one_to_the_bit(name, rows, group_size):
    x, packed = matrix(rows), name.removeprefix("fake-")
    expected = read(packed, stored(packed, x, group_size), x.shape, group_size)
    found = numpy(FORMATS[name].fake_quantize(keras.ops.convert_to_tensor(x), group_size))
    np.testing.assert_array_equal(found, expected)  # to the bit, but for the sign of zero
    assert FORMATS[name].packed_format is FORMATS[packed]


@each_packed
def test_what_has_been_rounded_stays(name):
    """What an integer format gives is on its grid; nf4's own scales move, its codes do not."""
    x = matrix()
    found = stored(name, x, 16)
    again = stored(name, read(name, found, x.shape, 16), 16)
    np.testing.assert_array_equal(again["codes"], found["codes"])
    assert name == "nf4" or np.allclose(again["scale"], found["scale"], rtol=2e-5)


# --- Groups that have no spread ---------------------------------------------------------------


@each_packed
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-12, -3e4])
def test_constant_groups(name: str, value: float):
    x = np.full((32, 6), value, "float32")
    found = stored(name, x, 8)
    assert all(np.isfinite(t).all() for t in found.values())
    values = read(name, found, x.shape, 8)
    np.testing.assert_allclose(values, x, rtol=2e-6, atol=1e-7)
    assert value != 0 or not values.any()


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_keep_zero(name: str, sign: int):
    """Keras' zero point would be cut off: its values would all be the end of the range."""
    x = sign * (5 + np.abs(matrix()))
    x[:, 0] = 0.0
    found = stored(name, x, 16)
    values = read(name, found, x.shape, 16)
    assert np.all(np.abs(values - x.astype("float64")) <= repeated(found["scale"], 16) * 0.500001)
    assert not values[:, 0].any()


@each_packed
def test_one_group_of_zeros_among_others(name: str):
    x = matrix()
    x[16:32, 3] = 0.0
    values = read(name, stored(name, x, 16), x.shape, 16)
    assert not values[16:32, 3].any()
    assert np.all(np.abs(values).max(axis=0) > 0)


@pytest.mark.parametrize("name", ["int8-row-scaled", "int4-row-scaled"])
def test_rows_that_are_multiplied_before_rounding_are_divided_after(name: str):
    x, format = matrix(), FORMATS[name]
    factors = np.exp(np.random.default_rng(1).standard_normal(48)).astype("float32")
    found = format.with_factors(x, factors, 16)
    plain = stored(format.integer.name, x * factors[:, None], 16)
    assert all(found[key].tobytes() == value.tobytes() for key, value in plain.items())
    values = read(name, found, x.shape, 16)
    np.testing.assert_allclose(values, dequantized(name, found, x.shape, 16), rtol=3e-7)
    bound = repeated(found["scale"], 16) * 0.500001 / factors[:, None]
    assert np.all(np.abs(values - x.astype("float64")) <= bound + 1e-8)


# --- Bytes ------------------------------------------------------------------------------------


@each_packed
@pytest.mark.parametrize(
    ("rows", "outputs", "group_size"), [(48, 20, 16), (49, 7, 7), (64, 300, 8)]
)
def test_bytes_are_those_of_the_arrays(name, rows, outputs, group_size):
    format = FORMATS[name]
    found = stored(name, matrix(rows, outputs), group_size)
    assert format.bytes(rows, outputs, group_size) == sum(t.nbytes for t in found.values())
    declared = format.tensors(rows, outputs, group_size)
    assert {k: (t.shape, str(t.dtype)) for k, t in found.items()} == declared
    assert next(iter(declared)) == "codes"


@pytest.mark.parametrize("kernels", [vit_small, convnext_tiny])
@pytest.mark.parametrize(
    ("name", "group_size", "share"),
    [("int8", None, 0.26), ("int4", 64, 0.16), ("nf4", None, 0.14), ("fake-int4", 64, 1.0)],
)
def test_kernels_of_real_models_take_what_they_should(kernels, name, group_size, share):
    format, total, packed = FORMATS[name], 0, 0
    for rows, outputs in kernels():
        wanted = group_size or format.default_group_size or rows
        packed += format.bytes(rows, outputs, fitted_group_size(wanted, rows))
        total += 4 * rows * outputs
    assert 0.9 * share < packed / total <= share


# --- Group sizes and names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "rows", "fitted"),
    [
        (64, 588, 49),
        (64, 128, 64),
        (64, 96, 48),
        (64, 48, 48),
        (16, 49, 7),
        (64, 62, 62),
        (4, 7, 7),
    ],
)
def test_the_divisor_next_to_a_group_size(wanted, rows, fitted):
    assert fitted_group_size(wanted, rows) == fitted


def test_names():
    assert kernel_format(None) is None
    for name, format in FORMATS.items():
        assert kernel_format(name) is format and format.name == name
    assert isinstance(kernel_format("nf4"), NF4)
    assert set(FAKE) == {f"fake-{name}" for name in INTEGER if "row" not in name}
