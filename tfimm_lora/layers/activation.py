"""Activation functions under timm's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops


def _gelu(x: Any) -> Any:
    return ops.gelu(x, approximate=False)


def _gelu_tanh(x: Any) -> Any:
    return ops.gelu(x, approximate=True)


def _quick_gelu(x: Any) -> Any:
    return x * ops.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": ops.relu,
    "silu": ops.silu,
}


def get_activation(name: str) -> Callable[[Any], Any]:
    """Returns the activation function with a timm name.

    Args:
        name: One of ``gelu`` (the erf form), ``gelu_tanh``, ``quick_gelu`` (OpenAI CLIP's
            ``x * sigmoid(1.702 x)``), ``relu`` and ``silu``.

    Returns:
        A function from tensor to tensor of the same shape.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> y = get_activation("gelu")(x)
    """
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"Unknown activation {name!r}. Use one of {', '.join(sorted(_ACTIVATIONS))}."
        )
    return _ACTIVATIONS[name]
