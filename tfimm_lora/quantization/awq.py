"""AWQ: rows that read large inputs are multiplied before rounding, and divided after.

Paper: arXiv:2306.00978. The factors are powers of the rows' mean absolute inputs; the power is
searched for. They are stored with the kernel, as Keras does, and nothing else is changed.
"""

from __future__ import annotations

import numpy as np
from keras import ops

from tfimm_lora.quantization.gptq import checked_matrix
from tfimm_lora.quantization.row_scaled import RowScaledFormat


def calibrate(
    format: RowScaledFormat,
    matrix: np.ndarray,
    mean_abs_input: np.ndarray,
    inputs_sample: np.ndarray,
    group_size: int | None = None,
    grid_points: int = 20,
) -> dict[str, np.ndarray]:
    """Quantises a kernel with more precision where inputs are large.

    Args:
        format: The format.
        matrix: The kernel, (rows, outputs).
        mean_abs_input: Mean absolute value of each row's input, (rows,).
        inputs_sample: Some inputs, (n, rows), on whose outputs powers are compared; on these the
            result is never worse than rounding to nearest.
        group_size: Consecutive rows that share a scale for each output, a divisor of the rows.
            Defaults to ``None``, all rows.
        grid_points: Number of steps from power 0 to 1. Defaults to 20.

    Returns:
        What the format stores, as ``format.quantize`` returns it.

    Raises:
        ValueError: Shapes or groups do not fit, or values are not finite.

    Example:
        >>> tensors = calibrate(FORMATS["int4-row-scaled"], kernel, read.mean_abs, read.sample, 64)
    """
    matrix, size = checked_matrix(matrix, group_size)
    matrix = matrix.astype("float32", copy=False)
    rows = len(matrix)
    magnitudes = np.asarray(mean_abs_input, "float32")
    if magnitudes.shape != (rows,) or not (np.isfinite(magnitudes) & (magnitudes >= 0)).all():
        raise ValueError(
            f"mean_abs_input has to be {rows} finite values of at least 0, one for each row of the "
            f"kernel; found the shape {magnitudes.shape}."
        )
    if grid_points < 1:
        raise ValueError(f"grid_points has to be at least 1, found {grid_points!r}.")
    if not magnitudes.any():  # Nothing was ever read: round to nearest.
        row_scale = np.ones(rows, "float32")
    else:
        sample = np.asarray(inputs_sample, "float32")
        if sample.ndim != 2 or sample.shape[1] != rows or not len(sample):
            raise ValueError(f"inputs_sample has to be (n, {rows}), found {sample.shape}.")
        if not np.isfinite(sample).all():
            raise ValueError("inputs_sample has values that are not finite (NaN or infinite).")
        row_scale = _search(matrix, magnitudes, sample, format, size, grid_points)
    return format.with_factors(matrix, row_scale, size)


def _search(
    matrix: np.ndarray,
    magnitudes: np.ndarray,
    sample: np.ndarray,
    format: RowScaledFormat,
    group_size: int,
    grid_points: int,
) -> np.ndarray:
    """The factors whose outputs on the sample are nearest to the kernel's."""
    # A row that read next to nothing must not set the others' scale.
    magnitudes = np.maximum(magnitudes, 1e-4 * magnitudes.max())
    best, least = np.ones(len(matrix), "float32"), np.inf
    for power in np.linspace(0, 1, grid_points + 1):
        factors = magnitudes**power
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype("float32")
        stored = format.with_factors(matrix, factors, group_size)
        values = ops.convert_to_numpy(format.dequantize(stored, matrix.shape, group_size))
        error = np.square(sample @ (values - matrix)).sum(dtype="float64")
        if error < least:
            best, least = factors, error
    return best
