"""What the methods have in common that rotate the rows of a kernel: OFT and BOFT."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import Method


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """How the rows of a kernel are cut into blocks.

    Attributes:
        block_size: Rows of a block; where it is no divisor of a kernel's rows, the nearest divisor
            is taken. Defaults to the method's, unless ``blocks`` is given.
        blocks: Number of blocks instead of their size; likewise.
    """

    block_size: int | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Flags are flags; every other option is a count.
            if field.type not in ("bool", bool):
                _check_count(field.name, value)
        if self.block_size is not None and self.blocks is not None:
            raise ValueError(
                f"block_size={self.block_size} and blocks={self.blocks} say the same in two ways. "
                "Use one of them."
            )


def _check_count(name: str, value: Any) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
    if value is not None and wrong:
        raise ValueError(f"{name} has to be an integer of at least 1, found {value!r}.")


class Rotation(Method):
    """A method that rotates blocks of the kernel's rows.

    Attributes:
        default_block_size: Rows of a block where the options say nothing.
    """

    Options: ClassVar[type] = BlockOptions
    combines = None
    takes_dropout = False
    default_block_size: ClassVar[int]

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        rows = self.layer.operation.kernel_sides(self.layer)[0]
        if self.options.blocks is not None:
            return rows // nearest_divisor(rows, self.options.blocks)
        return nearest_divisor(rows, self.options.block_size or self.default_block_size)


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of a size that is nearest to a number, of two the smaller one (as in PEFT).

    Args:
        size: What is divided.
        wanted: The number.

    Example:
        >>> nearest_divisor(768, 36)
        32
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def skew_from_triangle(values: Any, size: int) -> Any:
    """Skew-symmetric matrices from what is above their diagonals, row by row.

    Args:
        values: (blocks, size (size - 1) / 2).
        size: Rows of a matrix.

    Returns:
        (blocks, size, size).
    """
    rows, columns = np.triu_indices(size, 1)
    # A gather: entry (i, j) reads element index[i, j] with its sign.
    index = np.zeros((size, size), "int32")
    sign = np.zeros((size, size), "float32")
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    sign[rows, columns], sign[columns, rows] = 1, -1
    picked = ops.reshape(ops.take(values, index.reshape(-1), axis=1), (-1, size, size))
    return picked * sign


def cayley(skew: Any) -> Any:
    """The orthogonal matrices (I - Q) (I + Q)^-1 of skew-symmetric ones.

    Args:
        skew: Q, (blocks, size, size).
    """
    identity = ops.eye(skew.shape[-1], dtype=skew.dtype)
    # The two factors commute, and I + Q is never singular: eigenvalues of Q are imaginary.
    return ops.solve(identity + skew, identity - skew)


def cayley_neumann(skew: Any, terms: int) -> Any:
    """PEFT's series instead of the inverse: I + 2 Q + 2 Q² + ... + Q^(terms - 1).

    It is the series of (I + Q) (I - Q)^-1, the transpose of :func:`cayley`, and orthogonal only
    approximately.

    Args:
        skew: Q, (blocks, size, size).
        terms: Number of terms; PEFT's three are its four.
    """
    total = ops.eye(skew.shape[-1], dtype=skew.dtype) + ops.zeros_like(skew)
    if terms > 1:
        total = total + 2.0 * skew
    if terms > 2:
        power = ops.matmul(skew, skew)
        total = total + 2.0 * power
        for _ in range(3, terms - 1):
            power = ops.matmul(power, skew)
            total = total + 2.0 * power
        total = total + ops.matmul(power, skew)
    return total
