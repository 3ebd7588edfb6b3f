"""The arithmetic of normalisation, for arrays and tensors of any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def per_channel(values: Sequence[float], channels: int) -> np.ndarray:
    """Repeats per-channel values in turn, or cuts them, until there are ``channels``.

    Args:
        values: A value per channel of the images that a checkpoint was trained with.
        channels: Number of channels of the images at hand.

    Returns:
        Array of shape (channels,), float32.

    Example:
        >>> per_channel((0.5, 0.4, 0.3), 4)
        array([0.5, 0.4, 0.3, 0.5], dtype=float32)
    """
    return np.resize(np.asarray(values, "float32"), channels)


def normalize(pixels: Any, mean: np.ndarray, std: np.ndarray) -> Any:
    """Normalises values in [0, 255]: divides by 255, subtracts the mean, divides by the deviation.

    Args:
        pixels: Float32 array or tensor of shape (..., channels).
        mean: Mean per channel, shape (channels,).
        std: Standard deviation per channel, shape (channels,).

    Returns:
        The same kind of array or tensor.

    Example:
        >>> half = per_channel([0.5], 1)
        >>> normalize(np.full((1, 1, 1), 255, "float32"), half, half)
        array([[[1.]]], dtype=float32)
    """
    return (pixels / 255.0 - mean) / std
