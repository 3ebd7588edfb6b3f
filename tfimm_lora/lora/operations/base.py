"""What an operation has to know: how kernels and factors are applied, and their shapes."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops


class Operation(abc.ABC):
    """How a Keras layer uses its kernel.

    Operations have no state. ``layer`` is always a built layer of :attr:`layer_class`.

    Attributes:
        layer_class: The Keras layer.
        composed: Whether an update is best added to the kernel in each step instead of being
            applied in factored form: true where the kernel is small and its use is dear.
    """

    layer_class: ClassVar[type[keras.layers.Layer]]
    composed: ClassVar[bool] = False

    @abc.abstractmethod
    def outputs(self, layer: Any) -> int:
        """Number of outputs (columns of the kernel seen as a matrix)."""

    @abc.abstractmethod
    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of A and B for ``size`` outputs.

        Raises:
            ValueError: The operation cannot be adapted with this rank.
        """

    def kernel_sides(self, layer: Any) -> tuple[int, int]:
        """Rows and columns of the matrix that a low-rank update approximates."""
        columns = self.outputs(layer)
        return math.prod(layer.kernel.shape) // columns, columns

    @abc.abstractmethod
    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """Applies a kernel, without bias and activation."""

    @abc.abstractmethod
    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Applies A: inputs to rank-r activations."""

    @abc.abstractmethod
    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """Applies B: rank-r activations to outputs."""

    @abc.abstractmethod
    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B in the kernel's shape."""

    def add_bias(self, layer: Any, outputs: Any) -> Any:
        """Adds the layer's bias, if it has one."""
        return outputs if layer.bias is None else ops.add(outputs, layer.bias)

    @abc.abstractmethod
    def factors_to_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A and B in PEFT's layouts (``lora_A.weight``, ``lora_B.weight``)."""

    @abc.abstractmethod
    def factors_from_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of :meth:`factors_to_peft`.

        Raises:
            ValueError: The factors cannot be expressed here.
        """
