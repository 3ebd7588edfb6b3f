"""NF4 with doubly quantised scales, the format of QLoRA. Paper: arXiv:2305.14314.

A block of weights is divided by its largest absolute value and rounded to the nearest of 16
quantiles of the normal distribution. The blocks' largest values are quantised, too: 256 of them at
a time, less their mean over the kernel, to 8 bits of the dynamic data type of arXiv:1511.04561.
Codes and scales are those of bitsandbytes wherever the group size divides the rows, because it cuts
torch's (outputs, rows) into blocks as they come.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.quantization.format import PackedFormat, in_groups, pack_nibbles, unpack_nibbles

# The paper's appendix E.
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BLOCK = 256
_SMALLEST = np.float32(1e-38)


@functools.cache
def dynamic_values() -> np.ndarray:
    """The 256 values of the signed dynamic 8-bit type, in order, float32.

    Decades from 1e-6 to 1, each with twice as many steps as the one below.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        numbers, low = np.arange(count + 1.0), np.float32(0.1)
        step = float((np.float32(1) - low) / np.float32(count))
        # To the last bit as torch spaces numbers: from both ends, rounded once.
        edges = np.where(
            numbers < (count + 1) // 2, float(low) + step * numbers, 1 - step * (count - numbers)
        ).astype(np.float32)
        decade = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*decade, *-decade]
    return np.sort(np.array(values, np.float32))


def _nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Number of the nearest entry of a table; the lower one at a tie."""
    return np.searchsorted((table[:-1] + table[1:]) / 2, values, side="left").astype(np.uint8)


def _scaled(blocks: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return np.clip(blocks * (np.float32(1) / np.maximum(largest, _SMALLEST)), -1, 1)


class NF4(PackedFormat):
    """``nf4``: 4-bit codes, of which two share a byte, and doubly quantised scales."""

    name = "nf4"
    default_group_size = 64

    def tensors(
        self, rows: int, outputs: int, group_size: int
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """``codes``; of the groups' scales, in the order (outputs, groups), codes and their own."""
        blocks = -(-(rows // group_size * outputs) // _BLOCK)
        return {
            "codes": ((-(-rows // 2), outputs), "uint8"),
            "absmax": ((blocks, _BLOCK), "uint8"),
            "absmax_scale": ((blocks,), "float32"),
            "absmax_mean": ((), "float32"),
        }

    def quantize(self, matrix: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
        """Rounds to the nearest code."""
        groups = in_groups(np.asarray(matrix, np.float32), group_size)
        largest = np.abs(groups).max(axis=1, keepdims=True)
        codes = _nearest(_scaled(groups, largest), NF4_VALUES)
        flat = largest[:, 0].T.reshape(-1)
        mean = np.asarray(flat.mean(dtype=np.float64), np.float32)
        blocks = np.pad(flat - mean, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK)
        scale = np.abs(blocks).max(axis=1)
        return {
            "codes": pack_nibbles(codes.reshape(matrix.shape)),
            "absmax": _nearest(_scaled(blocks, scale[:, None]), dynamic_values()),
            "absmax_scale": scale,
            "absmax_mean": mean,
        }

    def dequantize(
        self, tensors: Mapping[str, Any], shape: tuple[int, int], group_size: int
    ) -> Any:
        """The codes' values times the scales."""
        rows, outputs = shape
        values = _look_up(dynamic_values(), tensors["absmax"])
        largest = values * tensors["absmax_scale"][:, None] + tensors["absmax_mean"]
        count = rows // group_size * outputs
        scales = ops.transpose(ops.reshape(ops.reshape(largest, (-1,))[:count], (outputs, -1)))
        codes = _look_up(NF4_VALUES, unpack_nibbles(tensors["codes"], rows))
        return ops.reshape(in_groups(codes, group_size) * scales[:, None], shape)


def _look_up(table: np.ndarray, codes: Any) -> Any:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Keras' take looks for negative numbers first, and in 32 bits: three more passes.
        return tf.gather(tf.constant(table), tf.cast(codes, tf.int16))
    return ops.take(ops.convert_to_tensor(table), ops.cast(codes, "int32"), axis=0)
