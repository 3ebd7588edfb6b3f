"""Depthwise convolutions: kernel (h, w, in, m), A (h, w, r), B (r, in * m).

The kernel is a matrix of h * w rows and one column per output channel, and the update is of low
rank in it: the filters of all channels are mixtures of r shared ones. It is again a depthwise
kernel, so it can be merged; PEFT's, which mixes channels, cannot.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.operations.base import Operation, along_axis


class DepthwiseConv2DOperation(Operation):
    """``keras.layers.DepthwiseConv2D``."""

    layer_class = keras.layers.DepthwiseConv2D
    # The kernel has 49 rows, say: adding to it costs nothing, a second convolution a lot.
    composed = True

    def outputs(self, layer: Any) -> int:
        """Input channels times depth multiplier."""
        return layer.kernel.shape[2] * layer.kernel.shape[3]

    def inputs(self, layer: Any) -> int:
        """Number of input channels."""
        return layer.kernel.shape[2]

    def spatial(self, layer: Any) -> tuple[int, ...]:
        """Height and width of the kernel."""
        return tuple(layer.kernel.shape[:2])

    def factor_shapes(self, layer: Any, rank: int, size: int) -> tuple[tuple[int, ...], ...]:
        """(h, w, r) and (r, size)."""
        return (*layer.kernel.shape[:2], rank), (rank, size)

    def apply_kernel(self, layer: Any, inputs: Any, kernel: Any) -> Any:
        """Depthwise convolution as the layer does it."""
        return ops.depthwise_conv(
            inputs,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def down(self, layer: Any, inputs: Any, a: Any) -> Any:
        """Not defined: A alone maps r times as many channels, see :attr:`composed`."""
        raise TypeError("A depthwise update is applied as a whole, through product().")

    def up(self, layer: Any, low: Any, b: Any) -> Any:
        """Not defined, see :meth:`down`."""
        raise TypeError("A depthwise update is applied as a whole, through product().")

    def product(self, layer: Any, a: Any, b: Any) -> Any:
        """A B in the kernel's shape."""
        return ops.reshape(ops.matmul(a, b), layer.kernel.shape)

    def kron_product(self, layer: Any, kron: tuple[Any, Any]) -> Any:
        """The one input row of every filter times the outputs."""
        left, right = kron
        spatial = right.shape[:-2]
        out = ops.einsum("ml,...nk->...mnlk", left, right)
        return ops.reshape(out, (*spatial, *layer.kernel.shape[2:]))

    def scale_inputs(self, layer: Any, inputs: Any, gain: Any) -> Any:
        """Not defined: the gain is part of the kernel, see :attr:`composed`."""
        raise TypeError("A depthwise update is applied as a whole, through the kernel.")

    def scale_outputs(self, layer: Any, outputs: Any, gain: Any) -> Any:
        """Not defined, see :meth:`scale_inputs`."""
        raise TypeError("A depthwise update is applied as a whole, through the kernel.")

    def scale_rows(self, layer: Any, kernel: Any, gain: Any) -> Any:
        """Channel by channel."""
        return kernel * gain[:, None]

    def add_bias(self, layer: Any, outputs: Any, bias: Any) -> Any:
        """Adds the bias along the channel axis."""
        return ops.add(
            outputs, along_axis(bias, -1 if layer.data_format == "channels_last" else 1, 4)
        )

    def factors_to_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(r, 1, h, w) and (out, r, 1, 1): our own form, which PEFT has not."""
        return a.transpose(2, 0, 1)[:, None], b.T[:, :, None, None]

    def factors_from_peft(
        self, layer: Any, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """From (r, 1, h, w) and (out, r, 1, 1)."""
        if a.shape[1] != 1:
            raise ValueError(
                f"Layer {layer.name!r}: a PEFT adapter of a depthwise convolution mixes channels. "
                "Such an update is no depthwise kernel (PEFT cannot merge it either)."
            )
        return a[:, 0].transpose(1, 2, 0), b.reshape(b.shape[0], -1).T
