"""Fitting a checkpoint's weight to a model that differs from it, as timm does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def adapt_first_conv(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """Adapts the first convolution to another number of input channels.

    One channel gets the sum of the kernel's channels; otherwise they are repeated in turn and
    scaled so that the response to a grey image keeps its size (timm's ``adapt_input_conv``).

    Args:
        kernel: (height, width, source channels, filters).
        in_channels: The wanted number of channels.

    Returns:
        (height, width, ``in_channels``, filters).

    Example:
        >>> kernel = adapt_first_conv(kernel, in_channels=5)
    """
    source = kernel.shape[2]
    if in_channels == source:
        return kernel
    if in_channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-in_channels // source), 1))[:, :, :in_channels]
    return repeated * np.asarray(source / in_channels, kernel.dtype)


def is_below(name: str, modules: str | Iterable[str]) -> bool:
    """Whether a timm weight name belongs to a module path, or to one of several (never to "")."""
    paths = (modules,) if isinstance(modules, str) else modules
    return any(path and name.startswith(path + ".") for path in paths)


def adapt_weight(
    model: Any, name: str, value: np.ndarray, shape: tuple[int, ...], source_size: Any = None
) -> np.ndarray:
    """Fits one weight in Keras' layout to a model.

    Args:
        model: The model; its ``cfg`` and ``adapt_weight``, where it has them, say what can differ.
        name: timm name of the weight.
        value: The weight.
        shape: The shape that the model needs.
        source_size: Height and width of the images that the weights were trained with.

    Returns:
        The fitted weight.

    Raises:
        ValueError: The shapes differ and nothing is known that would fit them.
    """
    cfg: Any = getattr(model, "cfg", None)
    found = value.shape
    if value.ndim == 4 and is_below(name, getattr(cfg, "first_conv", "").replace("/", ".")):
        value = adapt_first_conv(value, cfg.in_channels)
    if hasattr(type(model), "adapt_weight"):
        value = type(model).adapt_weight(name, value, shape, cfg, source_size)
    if value.shape != tuple(shape):
        raise ValueError(
            f"Weight {name!r} has shape {tuple(found)} in the source and {tuple(shape)} in the "
            "model (both in Keras' layout). The source is of another architecture or config."
        )
    return value
