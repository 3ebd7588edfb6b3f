"""Pooling over positions, under timm's names."""

from __future__ import annotations

from typing import Any

from keras import ops

POOLINGS = ("avg", "max", "avgmax")
"""Names of the poolings: mean, maximum, and the mean of both."""


def pool(x: Any, kind: str, axis: int | tuple[int, ...]) -> Any:
    """Pools over one or more axes.

    Args:
        x: A tensor.
        kind: ``avg``, ``max``, ``avgmax``, or ``""`` to leave the tensor as it is.
        axis: Axes of the positions.

    Returns:
        The tensor without these axes.

    Raises:
        ValueError: The kind is unknown.

    Example:
        >>> y = pool(x, "avg", axis=(1, 2))     # (batch, height, width, channels)
    """
    if not kind:
        return x
    if kind not in POOLINGS:
        raise ValueError(f"Unknown pooling {kind!r}. Use one of {', '.join(POOLINGS)}.")
    if kind == "avg":
        return ops.mean(x, axis=axis)
    if kind == "max":
        return ops.max(x, axis=axis)
    return (ops.mean(x, axis=axis) + ops.max(x, axis=axis)) / 2
