"""Arrays at addresses from which TensorFlow and JAX take them over without a copy."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

_ALIGNMENT = 64
_LARGE = 1 << 20
_TILE = 128
_POSIX = hasattr(mmap, "MAP_ANONYMOUS")


def empty_aligned(shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
    """An uninitialised, contiguous array whose address is a multiple of 64.

    Args:
        shape: Its shape.
        dtype: Its type. Defaults to float32.

    Example:
        >>> value = empty_aligned((3, 4))
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw: np.ndarray
    if size >= _LARGE:
        # Pages of its own, which go back to the system when the array is gone: on the heap, weights
        # that stay and buffers that go in turn would leave holes.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if _POSIX else {}
        raw = np.frombuffer(mmap.mmap(-1, size, **private), np.uint8)
    else:
        raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned(value: np.ndarray, dtype: Any) -> np.ndarray:
    """An array of this type and alignment with the same values, the same one if it is so already.

    Args:
        value: Any array.
        dtype: The wanted type.

    Example:
        >>> value = aligned(kernel.T, "float32")
    """
    fits = value.flags.c_contiguous and value.dtype == np.dtype(dtype)
    if fits and value.ctypes.data % _ALIGNMENT == 0:
        return value
    copy = empty_aligned(value.shape, dtype)
    if value.ndim == 2 and value.strides[0] < value.strides[1]:
        # Transposed: read tile by tile, it stays in the cache.
        for i in range(0, value.shape[0], _TILE):
            for j in range(0, value.shape[1], _TILE):
                copy[i : i + _TILE, j : j + _TILE] = value[i : i + _TILE, j : j + _TILE]
    else:
        copy[...] = value
    return copy
