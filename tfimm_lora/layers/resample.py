"""Resampling of position tables and patch kernels to another size.

Both follow timm (``resample_abs_pos_embed``, ``resample_patch_embed``): torch's interpolation,
which is a small matrix along each axis. Antialiased bicubic, the default, has half-pixel centres,
Keys' kernel with a = -0.5 and weights renormalised at the borders; bilinear is not antialiased.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from keras import ops


def _keys_kernel(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel (1981)."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x**2 + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _bicubic_weights(source: int, target: int) -> np.ndarray:
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale
    return _keys_kernel((np.arange(source)[None, :] + 0.5 - centres) / max(scale, 1.0))


def _bilinear_weights(source: int, target: int) -> np.ndarray:
    positions = (np.arange(target) + 0.5) * source / target - 0.5
    return _hat(positions.clip(0, source - 1), source)


def _bilinear_align_corners_weights(source: int, target: int) -> np.ndarray:
    return _hat(np.linspace(0, source - 1 if target > 1 else 0, target), source)


def _hat(positions: np.ndarray, source: int) -> np.ndarray:
    return np.maximum(1 - np.abs(np.arange(source)[None, :] - positions[:, None]), 0.0)


_WEIGHTS = {
    "bicubic": _bicubic_weights,
    "bilinear": _bilinear_weights,
    "bilinear_align_corners": _bilinear_align_corners_weights,
}

INTERPOLATIONS = tuple(_WEIGHTS)
"""Names of the interpolations."""


@functools.lru_cache(maxsize=64)
def _resize_matrix(source: int, target: int, interpolation: str) -> np.ndarray:
    """Matrix (target, source) of a resize along one axis, float64."""
    weights = _WEIGHTS[interpolation](source, target)
    return weights / weights.sum(axis=1, keepdims=True)


def resample_position_table(
    table: Any,
    source: tuple[int, int],
    target: tuple[int, int],
    prefix: int,
    interpolation: str = "bicubic",
) -> Any:
    """Resizes a position table to another grid of patches.

    Args:
        table: (1, ``prefix`` + source positions, width); a NumPy array or a tensor.
        source: Rows and columns of the table's grid.
        target: Rows and columns of the wanted grid.
        prefix: Number of rows at the start that belong to no patch and are kept.
        interpolation: ``bicubic`` (antialiased, the default), ``bilinear`` or
            ``bilinear_align_corners``.

    Returns:
        (1, ``prefix`` + target positions, width), of the same kind and type as ``table``.

    Example:
        >>> table = resample_position_table(table, (14, 14), (16, 16), prefix=1)
    """
    rows, columns = (
        _resize_matrix(s, t, interpolation) for s, t in zip(source, target, strict=True)
    )
    width = table.shape[-1]
    numpy = isinstance(table, np.ndarray)
    xp: Any = np if numpy else ops
    grid = xp.reshape(table[:, prefix:], (source[0], source[1], width))
    if numpy:
        grid = grid.astype("float64")
    else:
        rows, columns = (ops.convert_to_tensor(m, dtype="float32") for m in (rows, columns))
        grid = ops.cast(grid, "float32")
    grid = xp.einsum("hy,wx,yxc->hwc", rows, columns, grid)
    grid = xp.reshape(grid, (1, target[0] * target[1], width))
    grid = grid.astype(table.dtype) if numpy else ops.cast(grid, table.dtype)
    return xp.concatenate([table[:, :prefix], grid], axis=1)


def resample_patch_kernel(
    kernel: np.ndarray, target: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """Resizes a patch embedding so that resized patches keep their embeddings (FlexiViT).

    The kernel is multiplied by the pseudo-inverse of the resize matrix; a plain resize would
    change the scale of the tokens. Paper: arXiv:2212.08013.

    Args:
        kernel: (height, width, channels, tokens width).
        target: The wanted height and width.
        interpolation: See :func:`resample_position_table`.

    Returns:
        (``target[0]``, ``target[1]``, channels, tokens width), of the kernel's type.

    Example:
        >>> kernel = resample_patch_kernel(kernel, (14, 14))
    """
    height, width, channels, out = kernel.shape
    resize = np.kron(
        _resize_matrix(height, target[0], interpolation),
        _resize_matrix(width, target[1], interpolation),
    )
    flat = kernel.reshape(height * width, channels * out).astype("float64")
    resized = np.linalg.pinv(resize.T) @ flat
    return resized.reshape(*target, channels, out).astype(kernel.dtype)
