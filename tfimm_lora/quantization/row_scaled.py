"""Integers whose rows have factors of their own: ``W = (codes - zero) * scale / row_scale``.

What AWQ stores (arXiv:2306.00978): a row that reads large inputs is multiplied before rounding, so
that its error is smaller, and divided after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.quantization.format import KernelFormat, PackedFormat
from tfimm_lora.quantization.integer import INTEGER_FORMATS, IntegerFormat


@dataclasses.dataclass(frozen=True)
class RowScaledFormat(PackedFormat):
    """``int8-row-scaled`` and ``int4-row-scaled``: an integer format and a factor for each row.

    Calibration with AWQ chooses the factors; by itself the format rounds with factors of one.

    Attributes:
        name: Name of the format.
        integer: The format of codes, scales and zero points.
    """

    name: str
    integer: IntegerFormat

    def tensors(
        self, rows: int, outputs: int, group_size: int
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """What the integer format has, and ``row_scale`` (rows,)."""
        stored = self.integer.tensors(rows, outputs, group_size)
        return {**stored, "row_scale": ((rows,), "float32")}

    def quantize(self, matrix: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
        """Rounds to the nearest code, with factors of one."""
        return self.with_factors(matrix, np.ones(len(matrix), np.float32), group_size)

    def with_factors(
        self, matrix: np.ndarray, row_scale: np.ndarray, group_size: int
    ) -> dict[str, np.ndarray]:
        """Rounds a matrix whose rows are multiplied by factors.

        Args:
            matrix: float32, (rows, outputs), finite.
            row_scale: The factors, (rows,), float32, positive.
            group_size: Rows of a group.
        """
        stored = self.integer.quantize(matrix * row_scale[:, None], group_size)
        return {**stored, "row_scale": row_scale}

    def dequantize(
        self, tensors: Mapping[str, Any], shape: tuple[int, int], group_size: int
    ) -> Any:
        """(codes - zero) * scale / row_scale."""
        values = self.integer.dequantize(tensors, shape, group_size)
        return values / tensors["row_scale"][:, None]

    def reads(self, other: KernelFormat) -> bool:
        """Also what its integer format reads."""
        return other == self or self.integer.reads(other)

    def neutral(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Factors of one."""
        if name == "row_scale":
            return np.ones(shape, np.float32)
        return self.integer.neutral(name, shape)


ROW_SCALED = {
    f.name: RowScaledFormat(f"{f.name}-row-scaled", f)
    for f in INTEGER_FORMATS
    if f.name in ("int8", "int4")
}
"""The formats, by the name of their integer format."""
