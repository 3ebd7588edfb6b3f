"""Merging updates that are constant in a group of rows into the zero points of a packed kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tfimm_lora.quantization.integer import IntegerFormat
from tfimm_lora.quantization.stored_kernel import StoredKernel


def merges_exactly(layer: Any) -> bool:
    """Whether zero points can take up all active updates of a layer."""
    size = layer.group_size
    return size is not None and all(u.grouped(size) is not None for u in layer.updates)


def merge_into_zero_points(kernel: Any, updates: Iterable[Any]) -> bool:
    """Moves the zero points of a kernel by updates, if that is exact.

    ``(codes - zero) * scale + update`` is ``(codes - (zero - update / scale)) * scale`` where the
    update is the same for all rows that share a scale (QA-LoRA, arXiv:2309.14717).

    Args:
        kernel: What ``layer.kernel`` is.
        updates: Methods of the active adapters.

    Returns:
        Whether all updates have been merged; if not, nothing has changed.
    """
    format = getattr(kernel, "format", None)
    if not isinstance(kernel, StoredKernel) or not isinstance(format, IntegerFormat):
        return False
    if format.symmetric:
        return False
    moved = np.zeros((kernel.sides[0] // kernel.group_size, kernel.sides[1]), np.float64)
    for update in updates:
        grouped = update.grouped(kernel.group_size)
        if grouped is None:
            return False
        moved[:, update.site.start : update.site.start + update.site.size] += grouped
    zero, scale = (kernel.variables[name] for name in ("zero", "scale"))
    shifted = zero.numpy().astype(np.float64) - moved / scale.numpy()
    zero.assign(shifted.astype(np.float32))
    return True
