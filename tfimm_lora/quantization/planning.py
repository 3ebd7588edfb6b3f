"""Which kernels of a model are stored in which format: from patterns to layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.quantization.group_size import divides
from tfimm_lora.quantization.kernel_matrix import matrix_shape
from tfimm_lora.quantization.layer import StoresKernel
from tfimm_lora.quantization.registry import kernel_format, split_group_size
from tfimm_lora.weights.names import iterate_layers, timm_path
from tfimm_lora.weights.patterns import is_regex, matches

Quantization = str | Mapping[str, str | None] | None
"""A format for all kernels, or formats by pattern on the timm path; ``None`` is float.

A format may carry its group size: ``int4/64``.
"""


def storing_layers(model: Any) -> dict[str, StoresKernel]:
    """The layers of a model whose kernels can be stored in a format, by timm path."""
    return {
        timm_path(path): layer
        for path, layer in iterate_layers(model)
        if isinstance(layer, StoresKernel)
    }


def by_pattern(quantization: Quantization) -> dict[str, str | None]:
    """Formats by pattern."""
    return dict(quantization) if isinstance(quantization, Mapping) else {"*": quantization}


def plan_formats(
    model: Any,
    quantization: Quantization,
    group_size: int | None,
    trained: Iterable[str] = (),
    field: str = "lora_quantization",
) -> dict[str, tuple[str | None, int | None]]:
    """Finds the format of every layer that a pattern names.

    Args:
        model: A model, built or not.
        quantization: Formats.
        group_size: Group size of formats without one.
        trained: timm paths of layers that are trained in full, which cannot be packed.
        field: What to call the formats in messages.

    Returns:
        Names of formats and group sizes by timm path.

    Raises:
        ValueError: A pattern matches no layer, or would pack one that is trained in full.
    """
    layers, patterns = storing_layers(model), by_pattern(quantization)
    matching = {p: {m for m in layers if _matches(p, m)} for p in patterns}
    for pattern, found in matching.items():
        if not found:
            raise ValueError(
                f"{field}: {pattern!r} matches no layer with a kernel."
                f"{nearest_names(pattern, layers)}"
            )
    chosen: dict[str, tuple[str | None, int | None]] = {}
    for module in layers:
        found_by = [p for p, found in matching.items() if module in found]
        if not found_by:
            continue
        pattern = found_by[0]
        name, size = split_group_size(patterns[pattern], group_size, field)
        format = kernel_format(name)
        in_full = any(module == t or module.startswith(f"{t}.") for t in trained)
        if in_full and format is not None and format.packed:
            if pattern != "*":
                raise ValueError(
                    f"{field}: {pattern!r} names {module!r}, which is trained in full, and a "
                    f"kernel stored as {name} has no gradient. Give it None or a fake format, or "
                    "do not train it (lora_train_classifier, lora_modules_to_save)."
                )
            name = size = None
        chosen[module] = (name, size)
    return chosen


def check_formats(
    model: Any, planned: Mapping[str, tuple[str | None, int | None]], field: str
) -> None:
    """Tells which kernels of a built model stay in float, and whether group sizes are of use.

    Args:
        model: The model.
        planned: What :func:`plan_formats` has returned.
        field: What to call the group size in messages.

    Raises:
        ValueError: A group size divides the rows of no kernel.
    """
    layers = storing_layers(model)
    small = [m for m, (name, _) in planned.items() if name and not layers[m].kernel_format]
    if small:
        warnings.warn(
            f"The kernels of {', '.join(small[:5])}{' ...' if small[5:] else ''} stay in float: "
            "packed they would take more than half of the memory.",
            stacklevel=2,
        )
    check_group_sizes(model, planned, field)


def check_group_sizes(
    model: Any, planned: Mapping[str, tuple[str | None, int | None]], field: str
) -> None:
    """Raises if a group size divides the rows of no kernel; see :func:`check_formats`.

    Raises:
        ValueError: Says which.
    """
    layers = storing_layers(model)
    rows: dict[int, set[int]] = {}
    for module, (_, size) in planned.items():
        if size is not None:
            kernel = layers[module].kernel
            rows.setdefault(size, set()).add(matrix_shape(layers[module], tuple(kernel.shape))[0])
    for size, found in rows.items():
        if not any(divides(size, n) for n in found):
            raise ValueError(
                f"{field}={size} divides the rows of no kernel; they have "
                f"{', '.join(map(str, sorted(found)))}. Use a size that divides most of them, such "
                f"as {_common(found)}."
            )


def _common(rows: set[int]) -> int:
    """The group size of at most 64 that divides most of some numbers, the largest one."""
    return max(range(2, 65), key=lambda n: (sum(r % n == 0 for r in rows), n))


def _matches(pattern: str, module: str) -> bool:
    inside = not is_regex(pattern) and matches(f"{pattern}.*", module)
    return inside or matches(pattern, module)
