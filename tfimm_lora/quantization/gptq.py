"""GPTQ: rounds row by row and makes up for each row's error in the rows that follow.

Paper: arXiv:2210.17323. With the inverse of the Hessian H = U^T U, U upper triangular, and rows
w_j rounded to q_j,

    e_j = (w_j - q_j) / U_jj,    w_k -= U_jk e_j  for k > j.

This is done in NumPy. ``keras.quantizers`` has the same loop, but Keras hands it H^-1 where the
paper has U, finds the scales of a group from rows as they were at the start of a block of 128, and
finds new scales in every such block even when all rows share one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tfimm_lora.quantization.group_size import check_group_size, divisors
from tfimm_lora.quantization.integer import IntegerFormat

# Rows whose errors reach the rows behind them together.
_BLOCK = 32


def calibrate(
    format: IntegerFormat,
    matrix: np.ndarray,
    hessian: np.ndarray,
    group_size: int | None = None,
    dampening: float = 0.01,
    activation_order: bool = True,
) -> dict[str, np.ndarray]:
    """Quantises a kernel so that its outputs on the calibration data change little.

    Scales and zeros are found as in rounding to nearest; without activation order, from the rows
    as they are when the first of their group is rounded.

    Args:
        format: The format.
        matrix: The kernel, (rows, outputs).
        hessian: Sum of x x^T over the inputs x, (rows, rows), on any scale.
        group_size: Consecutive rows that share a scale for each output, a divisor of the rows.
            Defaults to ``None``, all rows.
        dampening: What is added to the Hessian's diagonal, in parts of its mean. Defaults to 0.01.
        activation_order: Whether rows with large inputs are rounded first. Groups stay as they
            are, with scales from the kernel as it was. Defaults to ``True``.

    Returns:
        What the format stores, as ``format.quantize`` returns it.

    Raises:
        ValueError: Shapes or groups do not fit, values are not finite, or the Hessian is not
            positive definite with this dampening.

    Example:
        >>> tensors = calibrate(FORMATS["int4"], kernel, statistics.hessian, group_size=64)
    """
    matrix, size = checked_matrix(matrix, group_size)
    work = matrix.astype("float64")
    rows, outputs = work.shape
    hessian = np.asarray(hessian, "float64")
    if hessian.shape != (rows, rows):
        raise ValueError(
            f"The Hessian of a kernel of {rows} rows has the shape ({rows}, {rows}), "
            f"found {hessian.shape}."
        )
    if not np.isfinite(hessian).all():
        raise ValueError("The Hessian has values that are not finite (NaN or infinite).")
    if not dampening >= 0:
        raise ValueError(f"dampening has to be at least 0, found {dampening!r}.")
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    if not activation_order:
        order = np.arange(rows)
    scale, zero = _scales(format, matrix, size)
    upper = _upper_factor(hessian[np.ix_(order, order)], dampening)
    work, groups = work[order], order // size
    codes = np.empty((rows, outputs), "float32")
    for start, end in _blocks(rows, rows if activation_order else size):
        if not activation_order and start % size == 0:
            group = slice(start // size, start // size + 1)
            scale[group], zero[group] = _scales(format, work[start : start + size], size)
        scales, zeros = scale[groups[start:end]], zero[groups[start:end]]
        block = upper[start:end, start:end]
        found, errors = _round_block(work[start:end], block, scales, zeros, format)
        codes[order[start:end]] = found
        work[end:] -= upper[start:end, end:].T @ errors
    return format.store(codes, scale, None if format.symmetric else zero)


def checked_matrix(matrix: np.ndarray, group_size: int | None) -> tuple[np.ndarray, int]:
    """A kernel's matrix as an array, and the rows that share a scale.

    Args:
        matrix: The kernel, (rows, outputs).
        group_size: Rows that share a scale; ``None``, and what is more than the rows, for all.

    Raises:
        ValueError: It is no finite matrix, or the groups do not fit.

    Example:
        >>> checked_matrix(np.ones((8, 2)), None)[1]
        8
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"A kernel is calibrated as a matrix (rows, outputs), not {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError("The kernel has values that are not finite (NaN or infinite).")
    check_group_size(group_size)
    rows = len(matrix)
    size = rows if group_size is None else min(group_size, rows)
    if rows % size:
        raise ValueError(
            f"group_size={group_size} does not divide the {rows} rows of the kernel. Use one of "
            f"{', '.join(map(str, divisors(rows)))}, or None for all rows."
        )
    return matrix, size


def _scales(
    format: IntegerFormat, matrix: np.ndarray, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and signed zeros, (groups, outputs).

    Keras' ``compute_quantization_parameters`` is not used: it holds zeros in uint8, which is wrong
    for groups without a value on either side of 0.
    """
    _, scale, zero = format.nearest(matrix, group_size)
    return scale, np.zeros_like(scale) if zero is None else zero


def _upper_factor(hessian: np.ndarray, dampening: float) -> np.ndarray:
    """U with H^-1 = U^T U, upper triangular."""
    mean = np.diagonal(hessian).mean()
    if mean == 0:  # Nothing was ever read: round to nearest.
        return np.eye(len(hessian))
    # Rows that read nothing keep this value alone on the diagonal, and are rounded to nearest.
    damped = hessian / mean
    damped[np.diag_indices_from(damped)] += dampening
    try:
        # From the last row on: H = R R^T with R upper triangular, so U is R^-1.
        root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"The Hessian is not positive definite with dampening={dampening}: too few inputs. "
            "Give more calibration data, or a larger dampening such as 0.01."
        ) from error
    return np.triu(np.linalg.solve(root, np.eye(len(root))))


def _blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    for group in range(0, rows, size):
        for start in range(group, group + size, _BLOCK):
            yield start, min(start + _BLOCK, group + size)


def _round_block(
    work: np.ndarray,
    upper: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    format: IntegerFormat,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and errors e of a few rows; ``scale`` and ``zero`` are those of each row."""
    low, high = format.code_range
    work, codes, errors = work.copy(), np.empty_like(work), np.empty_like(work)
    for i, row in enumerate(work):
        codes[i] = np.clip(np.round(row / scale[i]) + zero[i], low, high)
        errors[i] = (row - (codes[i] - zero[i]) * scale[i]) / upper[i, i]
        work[i + 1 :] -= np.outer(upper[i, i + 1 :], errors[i])
    return codes, errors
