"""PEFT's update of a convolution with groups: it mixes the channels of all groups.

A is a convolution over all input channels, B a 1x1 convolution with the layer's groups. The sum
with the layer's kernel is no grouped kernel, so such an update acts beside it and is not merged.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


def groups_of(layer: Any) -> int:
    """Number of groups of a layer: 1 unless it is a convolution with groups."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return layer.kernel.shape[2]
    return getattr(layer, "groups", 1)


def mixing_shapes(layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A (h, w, in, r) and B (r / groups, out).

    Raises:
        ValueError: The rank is not a multiple of the groups.
    """
    groups, operation = groups_of(layer), layer.operation
    if rank % groups:
        raise ValueError(
            f"Layer {layer.name!r}: rank {rank} is not a multiple of its {groups} groups, which "
            "an update that mixes channels needs."
        )
    spatial = tuple(layer.kernel.shape[:2])
    return (*spatial, operation.inputs(layer), rank), (rank // groups, operation.outputs(layer))


def apply_mixing(layer: Any, inputs: Any, a: Any, b: Any) -> Any:
    """The update's outputs."""
    low = ops.conv(
        inputs,
        a,
        strides=list(layer.strides),
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    last = layer.data_format == "channels_last"
    low = low if last else ops.moveaxis(low, 1, -1)
    groups, (ranks, outputs) = groups_of(layer), b.shape
    lead = ops.shape(low)[:-1]
    split = ops.reshape(low, (*lead, groups, ranks))
    factor = ops.reshape(b, (ranks, groups, outputs // groups))
    out = ops.reshape(ops.einsum("nhwgr,rgo->nhwgo", split, factor), (*lead, outputs))
    return out if last else ops.moveaxis(out, -1, 1)


def mixes(layer: Any, a: np.ndarray) -> bool:
    """Whether PEFT's A (r, in, h, w) reads channels of other groups than its ranks are for."""
    groups = groups_of(layer)
    if a.ndim != 4 or a.shape[1] == 1 or a.shape[0] % groups or a.shape[1] % groups:
        return False
    ranks, channels = a.shape[0] // groups, a.shape[1] // groups
    blocks = a.reshape(groups, ranks, groups, channels, *a.shape[2:])
    return any(np.any(blocks[g, :, h]) for g in range(groups) for h in range(groups) if g != h)


def mixing_to_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r, in, h, w) and (out, r / groups, 1, 1)."""
    return a.transpose(3, 2, 0, 1), b.T[:, :, None, None]


def mixing_from_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From (r, in, h, w) and (out, r / groups, 1, 1)."""
    return a.transpose(2, 3, 1, 0), b.reshape(b.shape[0], -1).T


def refuse_merging(layer: Any) -> None:
    """Raises: there is no kernel that does what the layer and the update do.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{layer.path}: the adapter mixes the channels of different groups, as PEFT's adapters of "
        "depthwise and grouped convolutions do. The sum is no kernel of such a convolution, so it "
        "cannot be merged, converted to a regular model or combined (PEFT cannot merge it either)."
    )
