"""Integers of 8 and 4 bits: ``W = (codes - zero) * scale``, packed or fake.

Scales, zero points and rounding are those of ``keras.quantizers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.quantization.format import (
    FakeFormat,
    KernelFormat,
    PackedFormat,
    in_groups,
    pack_nibbles,
    unpack_nibbles,
)

# Keras' epsilon, which keeps the scale of a group of zeros from being zero.
_EPSILON = np.float32(1e-7)


def _range(bits: int, symmetric: bool) -> tuple[float, float]:
    """The lowest and the highest signed code."""
    high = 2.0 ** (bits - 1) - 1
    # Keras leaves the lowest value of 8 symmetric bits out, and that of 4 in.
    return (-high if symmetric and bits == 8 else -high - 1), high


def _grid(groups: Any, bits: int, symmetric: bool, xp: Any) -> tuple[Any, Any, Any]:
    """Signed codes, scale and zero point of groups, all as floats.

    Args:
        groups: (groups, group_size, outputs).
        bits: 8 or 4.
        symmetric: Whether the zero point is 0.
        xp: ``numpy``, or ``keras.ops``, which has the same functions.
    """
    low, high = _range(bits, symmetric)
    if symmetric:
        largest = xp.max(xp.abs(groups), axis=1, keepdims=True)
        factor = high / (largest + _EPSILON)
        codes, scale, zero = xp.round(groups * factor), (largest + _EPSILON) / high, 0.0
    else:
        # Zero stays representable: where all weights have one sign, and where they are all equal.
        least = xp.minimum(xp.min(groups, axis=1, keepdims=True), np.float32(0))
        largest = xp.maximum(xp.max(groups, axis=1, keepdims=True), np.float32(0))
        scale = (largest - least + _EPSILON) / (high - low)
        zero = xp.clip(xp.round(-least / scale) + low, low, high)
        codes = xp.round(groups / scale) + zero
    return xp.clip(codes, low, high), scale, zero


@dataclasses.dataclass(frozen=True)
class IntegerFormat(PackedFormat):
    """``int8`` and ``int4``: one code for each weight, one scale for each group and output.

    Of 4 bits two codes share a byte, see :func:`~tfimm_lora.quantization.pack_nibbles`; they are
    stored without sign. Asymmetric formats have a zero point for each group and output, a float:
    an update that is constant in a group is merged by moving it.

    Attributes:
        name: Name of the format.
        bits: 8 or 4.
        symmetric: Whether the zero point is fixed in the middle.
    """

    name: str
    bits: int
    symmetric: bool

    def tensors(
        self, rows: int, outputs: int, group_size: int
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """``codes``, ``scale`` (groups, outputs) and, if asymmetric, ``zero`` (groups, outputs)."""
        whole = self.bits == 8
        codes = ((rows if whole else -(-rows // 2), outputs), "int8" if whole else "uint8")
        per_group = ((rows // group_size, outputs), "float32")
        found: dict[str, tuple[tuple[int, ...], str]] = {"codes": codes, "scale": per_group}
        return found if self.symmetric else {**found, "zero": per_group}

    @property
    def offset(self) -> float:
        """What is added to signed codes to store them."""
        return 0.0 if self.bits == 8 else 8.0

    @property
    def code_range(self) -> tuple[float, float]:
        """The lowest and the highest signed code."""
        return _range(self.bits, self.symmetric)

    def quantize(self, matrix: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
        """Rounds to the nearest code, half to even."""
        return self.store(*self.nearest(matrix, group_size))

    def nearest(
        self, matrix: np.ndarray, group_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The nearest codes with scales and zero points, as :meth:`store` takes them.

        Args:
            matrix: float32, (rows, outputs), finite.
            group_size: Rows of a group.
        """
        groups = in_groups(np.asarray(matrix, np.float32), group_size)
        codes, scale, zero = _grid(groups, self.bits, self.symmetric, np)
        return codes.reshape(matrix.shape), scale[:, 0], None if self.symmetric else zero[:, 0]

    def store(
        self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Packs codes that somebody else has chosen.

        Args:
            codes: Signed codes, (rows, outputs).
            scale: (groups, outputs).
            zero: Signed zero points, (groups, outputs); ``None`` for symmetric formats.
        """
        codes = codes + np.float32(self.offset)
        packed = codes.astype(np.int8) if self.bits == 8 else pack_nibbles(codes)
        found = {"codes": packed, "scale": scale.astype(np.float32)}
        if not self.symmetric:
            assert zero is not None
            found["zero"] = (zero + np.float32(self.offset)).astype(np.float32)
        return found

    def dequantize(
        self, tensors: Mapping[str, Any], shape: tuple[int, int], group_size: int
    ) -> Any:
        """(codes - zero) * scale."""
        codes = tensors["codes"]
        if self.bits == 4:
            codes = unpack_nibbles(codes, shape[0])
        groups = in_groups(ops.cast(codes, "float32"), group_size)
        if not self.symmetric:
            groups = groups - tensors["zero"][:, None]
        elif self.offset:
            groups = groups - self.offset
        return ops.reshape(groups * tensors["scale"][:, None], shape)

    def reads(self, other: KernelFormat) -> bool:
        """Also codes without zero points, if it has some."""
        same_bits = isinstance(other, IntegerFormat) and other.bits == self.bits
        return other == self or (same_bits and not self.symmetric)

    def neutral(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Zero points in the middle."""
        return np.full(shape, self.offset, np.float32)

    @property
    def asymmetric(self) -> IntegerFormat:
        """The format of as many bits that has zero points."""
        return ASYMMETRIC[self.bits]


@dataclasses.dataclass(frozen=True)
class FakeIntegerFormat(FakeFormat):
    """``fake-int8`` and ``fake-int4``: the values of the packed format, stored in float32.

    Attributes:
        name: Name of the format.
        packed_format: The format whose values it has.
    """

    name: str
    packed_format: IntegerFormat

    def fake_quantize(self, matrix: Any, group_size: int) -> Any:
        """Rounds to the nearest code, half to even."""
        packed = self.packed_format
        codes, scale, zero = _grid(
            in_groups(matrix, group_size), packed.bits, packed.symmetric, ops
        )
        return ops.reshape((codes - zero) * scale, matrix.shape)


INTEGER_FORMATS = (
    IntegerFormat("int8", 8, symmetric=True),
    IntegerFormat("int8-asymmetric", 8, symmetric=False),
    IntegerFormat("int4", 4, symmetric=False),
    IntegerFormat("int4-symmetric", 4, symmetric=True),
)
ASYMMETRIC = {f.bits: f for f in INTEGER_FORMATS if not f.symmetric}
FAKE_FORMATS = tuple(FakeIntegerFormat(f"fake-{f.name}", f) for f in INTEGER_FORMATS)
