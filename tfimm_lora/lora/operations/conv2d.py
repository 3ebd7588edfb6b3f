"""Convolutions: kernel (h, w, in / groups, out), A (h, w, in / groups, r), B (r / groups, out).

A carries the kernel's geometry, B is a 1x1 convolution. With groups, each group of outputs has its
own r / groups ranks, so that the update is again a grouped kernel and can be merged.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import Operation


def _channels_last(layer: Any) -> bool:
    return layer.data_format == "channels_last"


class Conv2DOperation(Operation):
    """``keras.layers.Conv2D`` with any strides, padding, dilation and groups."""

    layer_class = keras.layers.Conv2D

    def outputs(self, layer: Any) -> int:
        """Number of filters."""
        return layer.filters

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
            out = ops.matmul(low, b)
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

    def add_bias(self, layer: Any, outputs: Any) -> Any:
        """Adds the bias along the channel axis."""
        if layer.bias is None:
            return outputs
        shape = (1, 1, 1, -1) if _channels_last(layer) else (1, -1, 1, 1)
        return ops.add(outputs, ops.reshape(layer.bias, shape))

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
