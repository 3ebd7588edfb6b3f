"""Einsum layers, such as the projections of ``keras.layers.MultiHeadAttention``.

The axes of the kernel that are summed over are the rows of a matrix, the others its columns; A has
the rows and r, B has r and the columns.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import Operation, as_rows, kron_matmul, kron_pays
from tfimm_lora.quantization.kernel_matrix import einsum_letters


@dataclasses.dataclass(frozen=True)
class _Equations:
    """The layer's equation taken apart: letters of rows and columns, and the derived equations."""

    rows: str
    columns: str
    kernel: str
    inputs: str
    output: str
    down: str
    up: str
    product: str

    @classmethod
    def of(cls, layer: Any) -> _Equations:
        left, output = layer.equation.replace(" ", "").split("->")
        inputs = left.split(",")[0]
        rows, columns, kernel = einsum_letters(layer)
        r = next(c for c in string.ascii_letters if c not in layer.equation)
        low = "".join(c for c in inputs if c not in rows) + r
        return cls(
            rows,
            columns,
            kernel,
            inputs,
            output,
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

    def inputs(self, layer: Any) -> int:
        """Product of the sizes of the kernel's axes that are summed over."""
        equations = _Equations.of(layer)
        return math.prod(equations.sizes(equations.rows, layer))

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

    def kron_product(self, layer: Any, kron: tuple[Any, Any]) -> Any:
        """Between the rows and the columns of the kernel's matrix."""
        left, right = kron
        (m, l), (n, k) = left.shape, right.shape  # noqa: E741
        product = ops.einsum("ml,nk->mnlk", left, right)
        return self.from_matrix(layer, ops.reshape(product, (m * n, l * k)))

    def splits_kron(self, layer: Any, kron: tuple[Any, Any]) -> bool:
        """In large layers, where it is less work."""
        return kron_pays(layer, kron)

    def apply_kron(self, layer: Any, inputs: Any, kron: tuple[Any, Any]) -> Any:
        """Factor by factor over the axes that are summed over."""
        e = _Equations.of(layer)
        rest = "".join(c for c in e.inputs if c not in e.rows)
        ordered = ops.einsum(f"{e.inputs}->{rest}{e.rows}", inputs)
        lead = ops.shape(ordered)[: -len(e.rows)]
        out = kron_matmul(ops.reshape(ordered, (*lead, self.inputs(layer))), kron)
        out = ops.reshape(out, (*lead, *e.sizes(e.columns, layer)))
        return ops.einsum(f"{rest}{e.columns}->{e.output}", out)

    def scale_inputs(self, layer: Any, inputs: Any, gain: Any) -> Any:
        """Along the axes that are summed over."""
        e = _Equations.of(layer)
        gain = ops.reshape(gain, e.sizes(e.rows, layer))
        return ops.einsum(f"{e.inputs},{e.rows}->{e.inputs}", inputs, gain)

    def scale_outputs(self, layer: Any, outputs: Any, gain: Any) -> Any:
        """Along the new axes."""
        e = _Equations.of(layer)
        gain = ops.reshape(gain, e.sizes(e.columns, layer))
        return ops.einsum(f"{e.output},{e.columns}->{e.output}", outputs, gain)

    def scale_rows(self, layer: Any, kernel: Any, gain: Any) -> Any:
        """Row by row of the kernel's matrix."""
        return self.from_matrix(layer, self.to_matrix(layer, kernel) * gain[:, None])

    def as_matmul(self, layer: Any, inputs: Any) -> tuple[Any, Callable[[Any], Any]] | None:
        """With the axes that are summed over last, if the batch comes first."""
        e = _Equations.of(layer)
        free = [c for c in string.ascii_letters if c not in layer.equation]
        hidden = "".join(free[: len(inputs.shape) - len(e.inputs.replace("...", ""))])
        source, target = (text.replace("...", hidden) for text in (e.inputs, e.output))
        kept = "".join(c for c in source if c not in e.rows)
        if not source[0] == target[0] == kept[0]:
            return None
        sizes = dict(zip(source, ops.shape(inputs), strict=True))
        rows = self.kernel_sides(layer)[0]
        ordered = ops.transpose(inputs, [source.index(c) for c in kept + e.rows])

        def restore(outputs: Any) -> Any:
            middle = [sizes[c] for c in kept[1:]]
            shape = (ops.shape(outputs)[0], *middle, *e.sizes(e.columns, layer))
            order = kept + e.columns
            return ops.transpose(ops.reshape(outputs, shape), [order.index(c) for c in target])

        flat = ops.reshape(ordered, (*[sizes[c] for c in kept], rows))
        return as_rows(flat, rows), restore

    def bias_gain(self, layer: Any, gain: Any) -> Any:
        """The gain, whose axes are the kernel's, in the order of the bias's.

        Raises:
            ValueError: The bias is shared by outputs, or not by positions.
        """
        e = _Equations.of(layer)
        axes = "".join(c for c in e.output if c in (layer.bias_axes or ""))
        if set(axes) != set(e.columns):
            raise ValueError(
                f"Layer {layer.name!r} has bias_axes={layer.bias_axes!r}, and the gains of its "
                f"outputs have the axes {e.columns!r}: a bias that is not one value for each "
                "output cannot be scaled with them. Adapt the layer with another method."
            )
        return ops.einsum(f"{e.columns}->{axes}", ops.reshape(gain, e.sizes(e.columns, layer)))

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
