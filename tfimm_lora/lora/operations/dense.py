"""Dense layers: kernel (in, out), A (in, r), B (r, out)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import Operation


class DenseOperation(Operation):
    """``x W`` over the last axis."""

    layer_class = keras.layers.Dense

    def outputs(self, layer: Any) -> int:
        """Number of units."""
        return layer.units

    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """(in, r) and (r, size)."""
        return (layer.kernel.shape[0], rank), (rank, size)

    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """Matrix product."""
        return ops.matmul(inputs, kernel)

    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Matrix product with A."""
        return ops.matmul(inputs, a)

    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """Matrix product with B."""
        return ops.matmul(low, b)

    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B."""
        return ops.matmul(a, b)

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
