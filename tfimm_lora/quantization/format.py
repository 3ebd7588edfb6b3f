"""What a format of frozen kernels has to define."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from keras import ops


class KernelFormat(abc.ABC):
    """How a frozen kernel is stored, and which value it has for the layer.

    A format sees every kernel as a matrix, (rows, outputs), see
    :mod:`~tfimm_lora.quantization.kernel_matrix`. ``group_size`` consecutive rows share what an
    output's scale is; it divides the rows.

    Attributes:
        name: Name of the format, as in ``lora_quantization``.
        packed: Whether the float kernel is given up.
        default_group_size: Group size where none is given; ``None`` for all rows.
    """

    name: str
    packed: ClassVar[bool]
    default_group_size: ClassVar[int | None] = None

    @abc.abstractmethod
    def bytes(self, rows: int, outputs: int, group_size: int) -> int:
        """Bytes that a kernel takes."""


class PackedFormat(KernelFormat):
    """A format that stores codes; the float kernel exists only while the layer uses it."""

    packed = True

    @abc.abstractmethod
    def tensors(
        self, rows: int, outputs: int, group_size: int
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of what is stored, by name; the first one holds the codes."""

    @abc.abstractmethod
    def quantize(self, matrix: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
        """Turns a matrix into what is stored.

        Args:
            matrix: float32, (rows, outputs), finite.
            group_size: Rows of a group.
        """

    @abc.abstractmethod
    def dequantize(
        self, tensors: Mapping[str, Any], shape: tuple[int, int], group_size: int
    ) -> Any:
        """Turns what is stored into a float32 matrix; in ``keras.ops``, so that it can be compiled.

        Args:
            tensors: What is stored, by name.
            shape: (rows, outputs).
            group_size: Rows of a group.
        """

    def reads(self, other: KernelFormat) -> bool:
        """Whether what another format stores means the same in this one."""
        return other == self

    def neutral(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Value of a tensor that the other format of :meth:`reads` has not."""
        raise KeyError(name)

    def bytes(self, rows: int, outputs: int, group_size: int) -> int:
        """Bytes that a kernel takes."""
        stored = self.tensors(rows, outputs, group_size).values()
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stored)


class FakeFormat(KernelFormat):
    """A format that stores the float kernel and rounds it in each step."""

    packed = False

    @abc.abstractmethod
    def fake_quantize(self, matrix: Any, group_size: int) -> Any:
        """Quantises and dequantises a matrix; in ``keras.ops``.

        Args:
            matrix: float32, (rows, outputs).
            group_size: Rows of a group.
        """

    def bytes(self, rows: int, outputs: int, group_size: int) -> int:
        """Bytes that a kernel takes: those of float32."""
        return 4 * rows * outputs


def in_groups(matrix: Any, group_size: int) -> Any:
    """(rows, outputs) as (groups, group_size, outputs)."""
    rows, outputs = matrix.shape
    shape = (rows // group_size, group_size, outputs)
    return matrix.reshape(shape) if isinstance(matrix, np.ndarray) else ops.reshape(matrix, shape)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two values of 4 bits in a byte: rows 2 i in the low half, rows 2 i + 1 in the high one.

    Args:
        codes: (rows, outputs), 0 to 15.

    Returns:
        uint8, (half of the rows, rounded up; outputs).

    Example:
        >>> pack_nibbles(np.array([[1], [2]]))
        array([[33]], dtype=uint8)
    """
    codes = codes.astype(np.uint8)
    if len(codes) % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[:1])])
    return codes[0::2] | (codes[1::2] << 4)


def unpack_nibbles(packed: Any, rows: int) -> Any:
    """The inverse of :func:`pack_nibbles`, in ``keras.ops``.

    Args:
        packed: uint8, (half of the rows, rounded up; outputs).
        rows: Number of rows.
    """
    low = ops.bitwise_and(packed, np.uint8(15))
    high = ops.right_shift(packed, np.uint8(4))
    codes = ops.reshape(ops.stack([low, high], axis=1), (-1, packed.shape[-1]))
    return codes if rows == codes.shape[0] else codes[:rows]
