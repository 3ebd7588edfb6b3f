"""Dense layers: kernel (in, out), A (in, r), B (r, out)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import (
    Operation,
    as_rows,
    kron_matmul,
    kron_pays,
    matmul_last,
    scale_last,
)


class DenseOperation(Operation):
    """``x W`` over the last axis."""

    layer_class = keras.layers.Dense

    def outputs(self, layer: Any) -> int:
        """Number of units."""
        return layer.units

    def inputs(self, layer: Any) -> int:
        """Size of the last input axis."""
        return layer.kernel.shape[0]

    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """(in, r) and (r, size)."""
        return (layer.kernel.shape[0], rank), (rank, size)

    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """Matrix product."""
        return matmul_last(inputs, kernel)

    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Matrix product with A."""
        return matmul_last(inputs, a)

    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """Matrix product with B."""
        return matmul_last(low, b)

    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B."""
        return ops.matmul(a, b)

    def scale_inputs(self, layer: Any, inputs: Any, gain: Any) -> Any:
        """Along the last axis."""
        return scale_last(inputs, gain)

    def scale_outputs(self, layer: Any, outputs: Any, gain: Any) -> Any:
        """Along the last axis."""
        return scale_last(outputs, gain)

    def scale_rows(self, layer: Any, kernel: Any, gain: Any) -> Any:
        """Row by row."""
        return kernel * gain[:, None]

    def as_matmul(self, layer: Any, inputs: Any) -> tuple[Any, Callable[[Any], Any]]:
        """All axes between the first and the last in one."""
        middle = ops.shape(inputs)[1:-1]

        def restore(rows: Any) -> Any:
            return ops.reshape(rows, (ops.shape(rows)[0], *middle, layer.units))

        return as_rows(inputs, layer.kernel.shape[0]), restore

    def rotates_inputs(self, layer: Any) -> bool:
        """Rows are input features."""
        return True

    def rotate_inputs(self, layer: Any, inputs: Any, rotation: Any) -> Any:
        """Blocks of the last axis."""
        blocks, size, _ = rotation.shape
        if blocks == 1:
            return ops.matmul(inputs, rotation[0])
        # Not by einsum, which TensorFlow gets wrong in float16 on CPU.
        split = ops.transpose(ops.reshape(inputs, (-1, blocks, size)), (1, 0, 2))
        rotated = ops.transpose(ops.matmul(split, rotation), (1, 0, 2))
        return ops.reshape(rotated, ops.shape(inputs))

    def splits_kron(self, layer: Any, kron: tuple[Any, Any]) -> bool:
        """In large layers, where it is less work."""
        return kron_pays(layer, kron)

    def apply_kron(self, layer: Any, inputs: Any, kron: tuple[Any, Any]) -> Any:
        """Factor by factor over the last axis."""
        return kron_matmul(inputs, kron)

    def factors_to_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(r, in) and (out, r)."""
        return a.T, b.T

    def factors_from_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """From (r, in) and (out, r)."""
        return a.reshape(a.shape[0], -1).T, b.reshape(b.shape[0], -1).T
