"""A layer's kernel as a matrix: one row for each input of an output, one column for each output.

Rows are in torch's order: channel, height, width for convolutions.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops


def einsum_letters(layer: Any) -> tuple[str, str, str]:
    """Letters of an einsum layer's kernel: those of its rows, of its columns, and all in order.

    Args:
        layer: A ``keras.layers.EinsumDense``.

    Raises:
        ValueError: The kernel has axes that are neither summed over nor new.
    """
    left, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    rows = "".join(c for c in kernel if c in inputs and c not in output)
    columns = "".join(c for c in kernel if c in output and c not in inputs)
    if len(rows) + len(columns) != len(kernel) or not rows or not columns:
        raise ValueError(
            f"Layer {layer.name!r} has the equation {layer.equation!r}, whose kernel is no "
            "matrix from summed to new axes, so it has no low-rank update and cannot be quantised."
        )
    return rows, columns, kernel


def matrix_shape(layer: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a kernel of some shape.

    Args:
        layer: A Keras layer with a kernel.
        shape: The kernel's shape.
    """
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return math.prod(shape[:2]), math.prod(shape[2:])
    if isinstance(layer, keras.layers.EinsumDense):
        rows, _, letters = einsum_letters(layer)
        count = math.prod(n for c, n in zip(letters, shape, strict=True) if c in rows)
        return count, math.prod(shape) // count
    return math.prod(shape[:-1]), shape[-1]


def to_matrix(layer: Any, kernel: Any) -> Any:
    """The matrix, (rows, outputs), of a kernel or of a slice of its outputs."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return ops.reshape(kernel, matrix_shape(layer, tuple(kernel.shape)))
    if isinstance(layer, keras.layers.Conv2D):
        return ops.reshape(ops.transpose(kernel, (2, 0, 1, 3)), (-1, kernel.shape[-1]))
    if isinstance(layer, keras.layers.EinsumDense):
        rows, columns, letters = einsum_letters(layer)
        ordered = ops.einsum(f"{letters}->{rows}{columns}", kernel)
        return ops.reshape(ordered, matrix_shape(layer, tuple(kernel.shape)))
    return kernel


def from_matrix(layer: Any, matrix: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of :func:`to_matrix`.

    Args:
        layer: A Keras layer with a kernel.
        matrix: (rows, outputs); of a convolution or dense layer also a slice of the outputs.
        shape: Shape of the whole kernel.
    """
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return ops.reshape(matrix, shape)
    if isinstance(layer, keras.layers.Conv2D):
        height, width, channels, _ = shape
        kernel = ops.reshape(matrix, (channels, height, width, matrix.shape[-1]))
        return ops.transpose(kernel, (1, 2, 0, 3))
    if isinstance(layer, keras.layers.EinsumDense):
        rows, columns, letters = einsum_letters(layer)
        sizes = dict(zip(letters, shape, strict=True))
        ordered = ops.reshape(matrix, [sizes[c] for c in rows + columns])
        return ops.einsum(f"{rows}{columns}->{letters}", ordered)
    return matrix
