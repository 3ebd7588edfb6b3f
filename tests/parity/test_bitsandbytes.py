"""NF4 with double quantisation, against bitsandbytes: codes, scales and values to the bit.

Its portable kernel is what we are compared with; its compiled one for CPUs, which first rounds to a
grid of 65,536 values, takes a neighbouring code of the second level here and there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.oracles import Oracle
from tfimm_lora import lora
from tfimm_lora.quantization import FORMATS, unpack_nibbles
from tfimm_lora.quantization.nf4 import NF4_VALUES, dynamic_values

NF4 = FORMATS["nf4"]
SHAPES = {  # name: (rows, outputs), blocks of 64 rows
    "square": (384, 384),
    "tall": (1536, 384),
    "wide": (128, 1000),
    "few": (64, 3),
    "normal_without_outliers": (256, 64),
    "with_zeros": (128, 96),
    "constant": (64, 40),
}


def matrix(name: str) -> np.ndarray:
    generator = np.random.default_rng(len(name))
    rows, outputs = SHAPES[name]
    values = generator.standard_normal((rows, outputs)) * 0.05
    if name != "normal_without_outliers":
        values *= np.exp(generator.standard_normal(outputs))
    if name == "with_zeros":
        values[:64, ::3] = 0.0
    if name == "constant":
        values[:] = 0.02
    return values.astype("float32")


@pytest.fixture(scope="module")
def theirs(
    bitsandbytes_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Everything that bitsandbytes says about the matrices, with our means as offsets."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    given: dict[str, Any] = {}
    for name in SHAPES:
        given[name] = np.ascontiguousarray(matrix(name).T)  # torch's (outputs, inputs)
        given[f"offset.{name}"] = NF4.quantize(matrix(name), 64)["absmax_mean"]
    np.savez(folder / "given.npz", **given)
    bitsandbytes_oracle.call(
        "quantize", out=str(folder / "found.npz"), matrices=str(folder / "given.npz"), block=64
    )
    with np.load(folder / "found.npz") as archive:
        return dict(archive.items())


def test_tables(bitsandbytes_oracle: Oracle, tmp_path: Path):
    bitsandbytes_oracle.call("tables", out=str(tmp_path / "tables.npz"))
    with np.load(tmp_path / "tables.npz") as tables:
        assert tables["nf4"].astype("float32").tobytes() == NF4_VALUES.tobytes()
        assert tables["dynamic"].astype("float32").tobytes() == dynamic_values().tobytes()


@pytest.mark.parametrize("name", SHAPES)
def test_codes_scales_and_values_are_equal(name: str, theirs: dict[str, np.ndarray]):
    x = matrix(name)
    rows, outputs = x.shape
    ours = NF4.quantize(x, 64)
    codes = keras.ops.convert_to_numpy(unpack_nibbles(ours["codes"], rows))
    np.testing.assert_array_equal(codes.T.reshape(-1), theirs[f"{name}.codes"])
    count = rows // 64 * outputs
    flat = np.abs(x.reshape(-1, 64, outputs)).max(axis=1).T.reshape(-1)
    np.testing.assert_array_equal(flat, theirs[f"{name}.absmax"])
    absmax = ours["absmax"].reshape(-1)[:count]
    np.testing.assert_array_equal(absmax, theirs[f"{name}.absmax_codes"])
    second = theirs[f"{name}.second_absmax"]
    # They keep a scale from being zero, ours may be.
    assert np.maximum(ours["absmax_scale"], np.float32(1e-38)).tobytes() == second.tobytes()
    assert ours["absmax_mean"].tobytes() == theirs[f"{name}.offset"].tobytes()
    values = keras.ops.convert_to_numpy(NF4.dequantize(ours, x.shape, 64))
    np.testing.assert_array_equal(values.T, theirs[f"{name}.dequantized"])
    if name != "constant":  # all absmax values are their mean: their kernel for CPUs divides by 0
        other = theirs[f"{name}.absmax_codes_cpu"].astype(int)
        assert np.abs(other - absmax).max() <= 1
        assert np.mean(other != absmax) <= 0.02 or count < 100


def test_our_mean_is_theirs_but_for_the_order_of_summation(bitsandbytes_oracle, tmp_path):
    x = matrix("square")
    np.savez(tmp_path / "given.npz", square=np.ascontiguousarray(x.T))
    bitsandbytes_oracle.call(
        "quantize", out=str(tmp_path / "found.npz"), matrices=str(tmp_path / "given.npz"), block=64
    )
    with np.load(tmp_path / "found.npz") as found:
        ours = NF4.quantize(x, 64)
        assert found["square.offset"] == pytest.approx(ours["absmax_mean"], rel=1e-6)
        values = keras.ops.convert_to_numpy(NF4.dequantize(ours, x.shape, 64))
        np.testing.assert_allclose(values.T, found["square.dequantized"], rtol=0.03, atol=1e-7)


def test_a_layer_stores_what_bitsandbytes_stores(theirs: dict[str, np.ndarray]):
    layer = lora.LoRADense(384, lora_quantization="nf4")
    layer.build((None, 384))
    layer.kernel.assign(matrix("square"))
    found = {k: keras.ops.convert_to_numpy(v) for k, v in layer.kernel.variables.items()}
    absmax = found["absmax"].reshape(-1)[: 6 * 384]
    np.testing.assert_array_equal(absmax, theirs["square.absmax_codes"])
    values = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(layer.kernel))
    np.testing.assert_array_equal(values.T, theirs["square.dequantized"])
