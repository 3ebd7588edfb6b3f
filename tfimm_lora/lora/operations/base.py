"""What an operation has to know: how kernels and updates are applied, and their shapes."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.channel_mixing import apply_mixing, refuse_merging
from tfimm_lora.lora.update import Update
from tfimm_lora.quantization import kernel_matrix

# Multiplications in the time that XLA takes on a CPU to bring one value to another place.
_MOVE = 200


class Operation(abc.ABC):
    """How a Keras layer uses its kernel.

    Operations have no state. ``layer`` is always a built layer of :attr:`layer_class`. The kernel
    is also seen as a matrix, (rows, outputs), whose rows are in torch's order.

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
    def inputs(self, layer: Any) -> int:
        """Number of input features that a gain can scale."""

    @abc.abstractmethod
    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of A and B for ``size`` outputs.

        Raises:
            ValueError: The operation cannot be adapted with this rank.
        """

    def kernel_sides(self, layer: Any) -> tuple[int, int]:
        """Rows and columns of the kernel seen as a matrix."""
        columns = self.outputs(layer)
        return math.prod(layer.kernel.shape) // columns, columns

    def spatial(self, layer: Any) -> tuple[int, ...]:
        """Height and width of a convolution's kernel; empty for other layers."""
        return ()

    def to_matrix(self, layer: Any, kernel: Any) -> Any:
        """A kernel, or a slice of its outputs, as (rows, outputs)."""
        return kernel_matrix.to_matrix(layer, kernel)

    def from_matrix(self, layer: Any, matrix: Any) -> Any:
        """The inverse of :meth:`to_matrix`."""
        return kernel_matrix.from_matrix(layer, matrix, tuple(layer.kernel.shape))

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

    def factors(self, layer: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """Matrices (rows, r) and (r, outputs) as factors of the operation's shapes."""
        shapes = self.factor_shapes(layer, a.shape[-1], b.shape[-1])
        return ops.reshape(a, shapes[0]), ops.reshape(b, shapes[1])

    def factor_matrices(self, layer: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """The inverse of :meth:`factors`, without groups."""
        return ops.reshape(a, (-1, a.shape[-1])), ops.reshape(b, (b.shape[0], -1))

    @abc.abstractmethod
    def scale_inputs(self, layer: Any, inputs: Any, gain: Any) -> Any:
        """Multiplies every input feature with its gain."""

    @abc.abstractmethod
    def scale_outputs(self, layer: Any, outputs: Any, gain: Any) -> Any:
        """Multiplies every output with its gain."""

    @abc.abstractmethod
    def scale_rows(self, layer: Any, kernel: Any, gain: Any) -> Any:
        """The kernel that does what :meth:`scale_inputs` and the kernel do."""

    def rotates_inputs(self, layer: Any) -> bool:
        """Whether the rows of the kernel are the input features, so that these can be rotated."""
        return False

    def rotate_inputs(self, layer: Any, inputs: Any, rotation: Any) -> Any:
        """Multiplies blocks of input features with square matrices."""
        raise TypeError(f"{type(self).__name__} rotates kernels, not inputs.")

    def rotate_kernel(self, layer: Any, kernel: Any, rotation: Any) -> Any:
        """Multiplies blocks of the kernel's rows with square matrices."""
        matrix = self.to_matrix(layer, kernel)
        blocks, size, _ = rotation.shape
        split = ops.reshape(matrix, (blocks, size, matrix.shape[-1]))
        rotated = ops.reshape(ops.matmul(rotation, split), matrix.shape)
        return self.from_matrix(layer, rotated)

    def kron_product(self, layer: Any, kron: tuple[Any, Any]) -> Any:
        """The Kronecker product of an update in the kernel's shape."""
        left, right = kron
        (m, l), (*spatial, n, k) = left.shape, right.shape  # noqa: E741
        out = ops.einsum("ml,...nk->...mnlk", left, right)
        matrix_like = ops.reshape(out, (*spatial, m * n, l * k))
        return ops.reshape(matrix_like, (*layer.kernel.shape[:-1], l * k))

    def splits_kron(self, layer: Any, kron: tuple[Any, Any]) -> bool:
        """Whether a Kronecker product is applied factor by factor, by :meth:`apply_kron`."""
        return False

    def apply_kron(self, layer: Any, inputs: Any, kron: tuple[Any, Any]) -> Any:
        """Applies the Kronecker product of an update."""
        kernel = ops.cast(self.kron_product(layer, kron), inputs.dtype)
        return self.apply_kernel(layer, inputs, kernel)

    def composes(self, layer: Any, update: Update) -> bool:
        """Whether an update is applied as part of the kernel, by need or as the lesser work."""
        if update.delta is not None:
            return True
        if update.kron is not None and not self.splits_kron(layer, update.kron):
            return True
        return self.composed or (update.rotation is not None and not self.rotates_inputs(layer))

    def as_matmul(self, layer: Any, inputs: Any) -> tuple[Any, Callable[[Any], Any]] | None:
        """Sees the layer as a product with the kernel's matrix, for kernels that differ by example.

        Returns:
            The inputs as (batch, n, rows), and what brings (batch, n, outputs) into the layer's
            output shape; ``None`` if the layer is no such product.
        """
        return None

    def transform_inputs(self, layer: Any, inputs: Any, update: Update) -> Any:
        """What the kernel is applied to."""
        dtype = inputs.dtype
        if update.input_gain is not None:
            inputs = self.scale_inputs(layer, inputs, ops.cast(update.input_gain, dtype))
        if update.rotation is not None:
            inputs = self.rotate_inputs(layer, inputs, ops.cast(update.rotation, dtype))
        return inputs

    def finish(self, layer: Any, outputs: Any, inputs: Any, update: Update) -> Any:
        """Adapts what the kernel made of :meth:`transform_inputs`.

        Args:
            layer: The layer.
            outputs: The kernel's outputs, no bias.
            inputs: The layer's inputs, dropout applied.
            update: The update.
        """
        dtype = outputs.dtype
        if update.gain is not None and update.gain_tangent is None:
            outputs = self.scale_outputs(layer, outputs, ops.cast(update.gain, dtype))
        if update.a is not None:
            low = self.down(layer, inputs, ops.cast(update.a, dtype))
            outputs = outputs + self.up(layer, low, ops.cast(update.b, dtype))
        if update.kron is not None:
            kron = (ops.cast(update.kron[0], dtype), ops.cast(update.kron[1], dtype))
            outputs = outputs + self.apply_kron(layer, inputs, kron)
        if update.delta is not None:
            delta = ops.cast(update.delta, dtype)
            outputs = outputs + self.apply_kernel(layer, inputs, delta)
        if update.gain_tangent is not None:
            value, tangent = ops.stop_gradient(outputs), ops.cast(update.gain_tangent, dtype)
            outputs = outputs + self.scale_outputs(layer, value, tangent)
        return self.add_mixing(layer, outputs, inputs, update)

    def add_mixing(self, layer: Any, outputs: Any, inputs: Any, update: Update) -> Any:
        """Adds the update that mixes the channels of a grouped convolution, if there is one."""
        if update.mixing is None:
            return outputs
        a, b = (ops.cast(factor, outputs.dtype) for factor in update.mixing)
        return outputs + apply_mixing(layer, inputs, a, b)

    def scaled_kernel(self, layer: Any, kernel: Any, update: Update) -> Any:
        """The kernel with the update's factors: gains and rotation."""
        if update.rotation is not None:
            kernel = self.rotate_kernel(layer, kernel, ops.cast(update.rotation, kernel.dtype))
        if update.input_gain is not None:
            gain = ops.cast(update.input_gain, kernel.dtype)
            kernel = self.scale_rows(layer, kernel, gain)
        if update.gain is not None:
            matrix = self.to_matrix(layer, kernel) * ops.cast(update.gain, kernel.dtype)
            kernel = self.from_matrix(layer, matrix)
        return kernel

    def additive_kernel(self, layer: Any, update: Update) -> Any:
        """The sum of the update's terms in the kernel's shape; ``None`` if it has none.

        Raises:
            ValueError: The update mixes the channels of a grouped convolution.
        """
        if update.mixing is not None:
            refuse_merging(layer)
        terms = []
        if update.a is not None:
            terms.append(self.product(layer, update.a, update.b))
        if update.kron is not None:
            terms.append(self.kron_product(layer, update.kron))
        if update.delta is not None:
            terms.append(update.delta)
        return sum(terms[1:], start=terms[0]) if terms else None

    def adapted_bias(self, bias: Any, update: Update) -> Any:
        """The bias (or its slice) with the update's gain and term."""
        if update.bias_gain is not None:
            bias = bias * ops.reshape(ops.cast(update.bias_gain, bias.dtype), bias.shape)
        if update.bias_term is not None:
            bias = bias + ops.reshape(ops.cast(update.bias_term, bias.dtype), bias.shape)
        return bias

    def bias_gain(self, layer: Any, gain: Any) -> Any:
        """The gain of every output as that of the bias.

        Raises:
            ValueError: The bias has not one value for each output.
        """
        return gain

    def add_bias(self, layer: Any, outputs: Any, bias: Any) -> Any:
        """Adds a bias to outputs."""
        return ops.add(outputs, bias)

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


def kron_order(kron: tuple[Any, Any], passed: float = 1.0) -> tuple[float, bool]:
    """What a Kronecker product costs when it is applied factor by factor.

    Args:
        kron: The two factors.
        passed: Places of the inputs for each place of the outputs. Defaults to 1.

    Returns:
        Multiplications for each place of the outputs, and whether the second factor comes first.
    """
    left, right = kron
    (m, l), (*spatial, n, k) = left.shape, right.shape  # noqa: E741
    area = math.prod(spatial)
    right_first = m * n * area * k + m * l * k
    left_first = passed * m * l * n + n * area * k * l
    return min(right_first, left_first), right_first <= left_first


def kron_pays(layer: Any, kron: tuple[Any, Any], passed: float = 1.0) -> bool:
    """Whether a Kronecker product is less work factor by factor than as part of the kernel.

    Args:
        layer: The layer.
        kron: The two factors.
        passed: See :func:`kron_order`.
    """
    left, right = kron
    (m, l), (*spatial, n, k) = left.shape, right.shape  # noqa: E741
    # Forward, backward to the inputs, backward to the factors.
    work = 3 * (kron_order(kron, passed)[0] + _MOVE * (passed * m * n + l * k))
    # In float32 it is added to the kernel, and only its gradient is extra; else it stays apart.
    whole = (1 if layer.compute_dtype == "float32" else 3) * math.prod(spatial) * m * n * l * k
    return work < whole


def kron_matmul(inputs: Any, kron: tuple[Any, Any]) -> Any:
    """Multiplies the last axis, of size m * n, with the Kronecker product of (m, l) and (n, k)."""
    left, right = kron
    (m, l), (n, k) = left.shape, right.shape  # noqa: E741
    lead = ops.shape(inputs)[:-1]
    # With m (or l) in front both products are plain ones, and whole rows of n (or k) are moved.
    split = ops.transpose(ops.reshape(inputs, (-1, m, n)), (1, 0, 2))
    turned = ops.transpose(left)
    if kron_order(kron)[1]:
        out = ops.matmul(ops.reshape(split, (-1, n)), right)
        out = ops.matmul(turned, ops.reshape(out, (m, -1)))
    else:
        out = ops.matmul(turned, ops.reshape(split, (m, -1)))
        out = ops.matmul(ops.reshape(out, (-1, n)), right)
    out = ops.transpose(ops.reshape(out, (l, -1, k)), (1, 0, 2))
    return ops.reshape(out, (*lead, l * k))


def matmul_last(inputs: Any, matrix: Any) -> Any:
    """Multiplies the last axis with a matrix."""
    # Over four axes JAX takes twice as long for the matrix's gradient, which sums over three.
    *lead, size = ops.shape(inputs)
    outputs = ops.matmul(ops.reshape(inputs, (-1, size)), matrix)
    return ops.reshape(outputs, (*lead, matrix.shape[-1]))


def scale_last(inputs: Any, gain: Any) -> Any:
    """Multiplies the last axis with a gain."""
    # Over two axes XLA sums the gradient of the gain four times as fast as over four.
    shape = ops.shape(inputs)
    return ops.reshape(ops.reshape(inputs, (-1, shape[-1])) * gain, shape)


def along_axis(vector: Any, axis: int, rank: int) -> Any:
    """A vector in a shape that broadcasts along one axis of a tensor of some rank."""
    shape: Sequence[int] = [-1 if i == axis % rank else 1 for i in range(rank)]
    return ops.reshape(vector, shape)


def as_rows(inputs: Any, size: int) -> Any:
    """Reshapes (batch, ..., size) to (batch, n, size)."""
    batch, *middle = ops.shape(inputs)[:-1]
    known = all(isinstance(axis, int) for axis in middle)
    return ops.reshape(inputs, (batch, math.prod(middle) if known else -1, size))
