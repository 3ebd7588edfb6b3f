"""Einsum layers, such as the projections of ``keras.layers.MultiHeadAttention``.

The axes of the kernel that are summed over are the rows of a matrix, the others its columns; A has
the rows and r, B has r and the columns.
"""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import Operation


@dataclasses.dataclass(frozen=True)
class _Equations:
    """The layer's equation taken apart: letters of rows and columns, and the derived equations."""

    rows: str
    columns: str
    kernel: str
    down: str
    up: str
    product: str

    @classmethod
    def of(cls, layer: Any) -> _Equations:
        left, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = left.split(",")
        rows = "".join(c for c in kernel if c in inputs and c not in output)
        columns = "".join(c for c in kernel if c in output and c not in inputs)
        if len(rows) + len(columns) != len(kernel) or not rows or not columns:
            raise ValueError(
                f"Layer {layer.name!r} has the equation {layer.equation!r}, whose kernel is no "
                "matrix from summed to new axes, so it has no low-rank update."
            )
        r = next(c for c in string.ascii_letters if c not in layer.equation)
        low = "".join(c for c in inputs if c not in rows) + r
        return cls(
            rows,
            columns,
            kernel,
            f"{inputs},{rows}{r}->{low}",
            f"{low},{r}{columns}->{output}",
            f"{rows}{r},{r}{columns}->{kernel}",
        )

    def sizes(self, letters: str, layer: Any) -> tuple[int, ...]:
        """Sizes of some axes of the kernel."""
        return tuple(layer.kernel.shape[self.kernel.index(c)] for c in letters)


class EinsumDenseOperation(Operation):
    """``keras.layers.EinsumDense`` whose kernel is a matrix between groups of axes."""

    layer_class = keras.layers.EinsumDense

    def outputs(self, layer: Any) -> int:
        """Product of the sizes of the kernel's new axes."""
        equations = _Equations.of(layer)
        return math.prod(equations.sizes(equations.columns, layer))

    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """(*rows, r) and (r, *columns)."""
        e = _Equations.of(layer)
        return (*e.sizes(e.rows, layer), rank), (rank, *e.sizes(e.columns, layer))

    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """The layer's einsum."""
        return ops.einsum(layer.equation, inputs, kernel)

    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Sums over the rows."""
        return ops.einsum(_Equations.of(layer).down, inputs, a)

    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """Spreads over the columns."""
        return ops.einsum(_Equations.of(layer).up, low, b)

    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B in the kernel's shape."""
        return ops.einsum(_Equations.of(layer).product, a, b)

    def factors_to_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(r, product of rows) and (product of columns, r)."""
        return a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T

    def factors_from_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """From (r, product of rows) and (product of columns, r)."""
        shape_a, shape_b = self.factor_shapes(layer, a.shape[0], 0)
        return a.T.reshape(shape_a), b.T.reshape(shape_b)
