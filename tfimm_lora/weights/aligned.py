"""Arrays at addresses from which TensorFlow and JAX take them over without a copy."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

_ALIGNMENT = 64
_LARGE = 1 << 20
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
    copy[...] = value
    return copy
