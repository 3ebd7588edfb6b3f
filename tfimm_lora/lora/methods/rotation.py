"""What the methods have in common that rotate the rows of a kernel: OFT and BOFT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras import ops


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


def triangle_size(entries: int) -> int:
    """Rows of the matrix that has so many entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2
