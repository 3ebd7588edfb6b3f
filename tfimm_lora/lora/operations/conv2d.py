"""Convolutions: kernel (h, w, in / groups, out), A (h, w, in / groups, r), B (r / groups, out).

A carries the kernel's geometry, B is a 1x1 convolution. With groups, each group of outputs has its
own r / groups ranks, so that the update is again a grouped kernel and can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import (
    Operation,
    along_axis,
    as_rows,
    kron_matmul,
    kron_order,
    kron_pays,
    matmul_last,
    scale_last,
)
from tfimm_lora.lora.operations.dense import DenseOperation


def _channels_last(layer: Any) -> bool:
    return layer.data_format == "channels_last"


class Conv2DOperation(Operation):
    """``keras.layers.Conv2D`` with any strides, padding, dilation and groups."""

    layer_class = keras.layers.Conv2D

    def outputs(self, layer: Any) -> int:
        """Number of filters."""
        return layer.filters

    def inputs(self, layer: Any) -> int:
        """Number of input channels."""
        return layer.kernel.shape[2] * layer.groups

    def spatial(self, layer: Any) -> tuple[int, ...]:
        """Height and width of the kernel."""
        return tuple(layer.kernel.shape[:2])

    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """(h, w, in / groups, r) and (r / groups, size)."""
        if rank % layer.groups:
            near = max(rank // layer.groups, 1) * layer.groups
            raise ValueError(
                f"Layer {layer.name!r}: rank {rank} is not a multiple of its {layer.groups} groups."
                f" Use rank {near}, for this layer alone through lora_rank_pattern."
            )
        return (*layer.kernel.shape[:3], rank), (rank // layer.groups, size)

    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """Convolution as the layer does it."""
        return ops.conv(
            inputs,
            kernel,
            strides=list(layer.strides),
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Convolution with A, of the kernel's geometry."""
        return self.apply_kernel(layer, inputs, a)

    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """1x1 convolution with B, as a matrix product per group."""
        if not _channels_last(layer):
            low = ops.moveaxis(low, 1, -1)
        if layer.groups == 1:
            out = matmul_last(low, b)
        else:
            ranks, filters = b.shape
            split = ops.reshape(low, (*ops.shape(low)[:-1], layer.groups, ranks))
            factor = ops.reshape(b, (ranks, layer.groups, filters // layer.groups))
            out = ops.einsum("nhwgr,rgo->nhwgo", split, factor)
            out = ops.reshape(out, (*ops.shape(low)[:-1], filters))
        return out if _channels_last(layer) else ops.moveaxis(out, -1, 1)

    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B per group, in the kernel's shape."""
        if layer.groups == 1:
            return ops.matmul(a, b)
        height, width, channels, rank = a.shape
        ranks, filters = b.shape
        left = ops.reshape(a, (height, width, channels, layer.groups, rank // layer.groups))
        right = ops.reshape(b, (ranks, layer.groups, filters // layer.groups))
        out = ops.einsum("hwigr,rgo->hwigo", left, right)
        return ops.reshape(out, (height, width, channels, filters))

    def factors(self, layer: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """A convolution with the kernel's geometry and a matrix; without groups."""
        return self.from_matrix(layer, a), b

    def factor_matrices(self, layer: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """A with its rows in torch's order."""
        return self.to_matrix(layer, a), b

    def splits_kron(self, layer: Any, kron: tuple[Any, Any]) -> bool:
        """Without groups and in large layers, where it is less work."""
        if layer.groups > 1 or not _channels_last(layer):
            return False
        return kron_pays(layer, kron, math.prod(layer.strides))

    def apply_kron(self, layer: Any, inputs: Any, kron: tuple[Any, Any]) -> Any:
        """The second factor is a convolution of its own, of m parts of the channels."""
        if not self.splits_kron(layer, kron):
            return super().apply_kron(layer, inputs, kron)
        left, right = kron
        (m, l), (height, width, n, k) = left.shape, right.shape  # noqa: E741
        if (height, width, *layer.strides) == (1, 1, 1, 1):
            return kron_matmul(inputs, (left, ops.reshape(right, (n, k))))
        batch, *places, _ = ops.shape(inputs)
        split = ops.reshape(inputs, (batch, *places, m, n))
        _, right_first = kron_order(kron, math.prod(layer.strides))
        if not right_first:
            split = ops.einsum("bhwmn,ml->bhwln", split, left)
        parts = m if right_first else l
        split = ops.reshape(ops.transpose(split, (0, 3, 1, 2, 4)), (-1, *places, n))
        out = self.apply_kernel(layer, split, right)
        places = ops.shape(out)[1:3]
        out = ops.reshape(out, (-1, parts, *places, k))
        if right_first:
            out = ops.einsum("bmhwk,ml->bhwlk", out, left)
        else:
            out = ops.transpose(out, (0, 2, 3, 1, 4))
        return ops.reshape(out, (-1, *places, l * k))

    def scale_inputs(self, layer: Any, inputs: Any, gain: Any) -> Any:
        """Along the channel axis."""
        if _channels_last(layer):
            return scale_last(inputs, gain)
        return inputs * along_axis(gain, 1, 4)

    def scale_outputs(self, layer: Any, outputs: Any, gain: Any) -> Any:
        """Along the channel axis."""
        return self.scale_inputs(layer, outputs, gain)

    def scale_rows(self, layer: Any, kernel: Any, gain: Any) -> Any:
        """Every group of filters reads the gains of its own channels."""
        per_group = ops.transpose(ops.reshape(gain, (layer.groups, -1)))
        return kernel * ops.repeat(per_group, layer.filters // layer.groups, axis=-1)

    def as_matmul(self, layer: Any, inputs: Any) -> tuple[Any, Callable[[Any], Any]] | None:
        """A 1x1 convolution without groups is one."""
        if not self.rotates_inputs(layer):
            return None
        height, width = layer.strides
        inputs = inputs[:, ::height, ::width]
        middle = ops.shape(inputs)[1:-1]

        def restore(rows: Any) -> Any:
            return ops.reshape(rows, (ops.shape(rows)[0], *middle, layer.filters))

        return as_rows(inputs, layer.kernel.shape[2]), restore

    def rotates_inputs(self, layer: Any) -> bool:
        """Rows are input channels in a 1x1 convolution."""
        pointwise = tuple(layer.kernel.shape[:2]) == (1, 1) and layer.groups == 1
        return pointwise and _channels_last(layer)

    def rotate_inputs(self, layer: Any, inputs: Any, rotation: Any) -> Any:
        """Blocks of the channel axis."""
        return DenseOperation().rotate_inputs(layer, inputs, rotation)

    def add_bias(self, layer: Any, outputs: Any, bias: Any) -> Any:
        """Adds the bias along the channel axis."""
        return ops.add(outputs, along_axis(bias, -1 if _channels_last(layer) else 1, 4))

    def factors_to_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(r, in, h, w) and (out, r / groups, 1, 1).

        PEFT's A reads all input channels; with groups, ours is block-diagonal in it.
        """
        a = a.transpose(3, 2, 0, 1)
        if layer.groups > 1:
            rank, channels, height, width = a.shape
            dense = np.zeros((rank, channels * layer.groups, height, width), a.dtype)
            per_group = rank // layer.groups
            for g in range(layer.groups):
                rows = slice(g * per_group, (g + 1) * per_group)
                dense[rows, g * channels : (g + 1) * channels] = a[rows]
            a = dense
        return a, b.T[:, :, None, None]

    def factors_from_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """From (r, in, h, w) and (out, r / groups, 1, 1)."""
        if layer.groups > 1:
            rank, channels = a.shape[0], a.shape[1] // layer.groups
            per_group = rank // layer.groups
            blocks, rest = [], a.copy()
            for g in range(layer.groups):
                rows = slice(g * per_group, (g + 1) * per_group)
                columns = slice(g * channels, (g + 1) * channels)
                blocks.append(a[rows, columns])
                rest[rows, columns] = 0
            if np.any(rest):
                raise ValueError(
                    f"Layer {layer.name!r}: the adapter mixes the channels of different groups. "
                    "Such an update is no grouped kernel (PEFT cannot merge it either)."
                )
            a = np.concatenate(blocks)
        return a.transpose(2, 3, 1, 0), b.reshape(b.shape[0], -1).T
