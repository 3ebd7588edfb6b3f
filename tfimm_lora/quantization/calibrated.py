"""Storing the kernels of a model in formats, with codes chosen by calibration where it serves."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.quantization import awq, gptq
from tfimm_lora.quantization.calibration import Statistics, capture_in_passes, unserved_reason
from tfimm_lora.quantization.format import KernelFormat, PackedFormat
from tfimm_lora.quantization.integer import IntegerFormat
from tfimm_lora.quantization.planning import Quantization, by_pattern, storing_layers
from tfimm_lora.quantization.registry import kernel_format, split_group_size
from tfimm_lora.quantization.row_scaled import ROW_SCALED, RowScaledFormat


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm that chooses codes.

    Attributes:
        serves: Class of the formats that it chooses codes for.
        needs_hessian: Whether it uses second moments of inputs.
        round: Makes what is stored of a format, a matrix, statistics and a group size.
    """

    serves: type[KernelFormat]
    needs_hessian: bool
    round: Callable[[Any, np.ndarray, Statistics, int], dict[str, np.ndarray]]


def _gptq(
    format: IntegerFormat, matrix: np.ndarray, read: Statistics, group_size: int
) -> dict[str, np.ndarray]:
    assert read.hessian is not None
    return gptq.calibrate(format, matrix, read.hessian, group_size)


def _awq(
    format: RowScaledFormat, matrix: np.ndarray, read: Statistics, group_size: int
) -> dict[str, np.ndarray]:
    return awq.calibrate(format, matrix, read.mean_abs, read.sample, group_size)


ALGORITHMS = {
    "gptq": Algorithm(IntegerFormat, needs_hessian=True, round=_gptq),
    "awq": Algorithm(RowScaledFormat, needs_hessian=False, round=_awq),
}
"""The algorithms by name."""


def calibrated_formats(
    quantization: Quantization, calibration: Any, algorithm: str | None
) -> Quantization:
    """Checks what calibration is asked for, and names the formats that it needs.

    Args:
        quantization: The formats wanted.
        calibration: Images, or ``None``.
        algorithm: ``gptq``, ``awq`` or ``None``.

    Returns:
        The same formats; with AWQ, ``int8`` and ``int4`` have become row-scaled.

    Raises:
        ValueError: The algorithm is unknown, there are no images for it, or no format is served.
    """
    if calibration is None:
        if algorithm is not None:
            raise ValueError(
                f"algorithm={algorithm!r} chooses codes by what layers read, and there are no "
                "images. Pass calibration=images, or leave algorithm out to round to nearest."
            )
        return quantization
    name = algorithm or "gptq"
    if name not in ALGORITHMS:
        raise ValueError(
            f"Unknown algorithm {name!r}.{nearest_names(str(name), ALGORITHMS)} Use one of "
            f"{', '.join(ALGORITHMS)}."
        )
    formats = by_pattern(quantization)
    if name == "awq":
        formats = {pattern: _row_scaled(text) for pattern, text in formats.items()}
    served = ALGORITHMS[name].serves
    if not any(isinstance(kernel_format(split_group_size(f)[0]), served) for f in formats.values()):
        raise ValueError(
            f"calibration with {name} has nothing to choose in {quantization!r}. It serves int8 "
            f"and int4{' with all their variants' if name == 'gptq' else ''}; leave calibration "
            "out for other formats."
        )
    return formats if isinstance(quantization, Mapping) else formats["*"]


def _row_scaled(text: str | None) -> str | None:
    """``int4/64`` as ``int4-row-scaled/64``; other formats as they are."""
    if not isinstance(text, str):
        return text
    name, slash, size = text.partition("/")
    return f"{ROW_SCALED[name].name if name in ROW_SCALED else name}{slash}{size}"


def store_kernels(
    model: Any,
    planned: Mapping[str, tuple[str | None, int | None]],
    store: Callable[[str], None],
    calibration: Any = None,
    algorithm: str | None = None,
) -> None:
    """Stores kernels as planned.

    With calibration, the images run through the model as it is; if their statistics do not fit in
    memory at once, several times, and then the later layers read what those before them give when
    they are quantised. Layers that cannot be calibrated come last and are rounded to nearest.

    Args:
        model: The model; with calibration, built.
        planned: What :func:`~tfimm_lora.quantization.planning.plan_formats` has returned.
        store: Stores the kernel of the layer with a timm path in its format.
        calibration: Images, (n, height, width, channels), or batches of them; ``None`` to round
            all kernels to nearest.
        algorithm: See :func:`calibrated_formats`, which has checked it.

    Raises:
        ValueError: There are no images, or what layers read is not finite.
    """
    rest = list(planned)
    if calibration is not None:
        chosen = ALGORITHMS[algorithm or "gptq"]
        layers: dict[str, Any] = dict(storing_layers(model))
        changed = [m for m in planned if _changes(layers[m], *planned[m])]
        reasons = {m: _reason(layers[m], planned[m][0], chosen) for m in changed}
        served = [m for m, reason in reasons.items() if not reason]
        _warn_of_rest({m: reason for m, reason in reasons.items() if reason})
        if not served:
            raise ValueError(
                "calibration: no kernel is left to be calibrated. Those that are stored in these "
                "formats already have no other values; calibrate when kernels are float."
            )
        progress: Any = None
        for module, rounding in _roundings(model, served, layers, calibration, chosen):
            # From here on: the images have run through the model.
            progress = progress or keras.utils.Progbar(len(served), unit_name="kernel")
            layers[module].kernel_rounding = rounding
            try:
                store(module)
            finally:
                layers[module].kernel_rounding = None
            progress.add(1)
        rest = [m for m in planned if m not in served]
    for module in rest:
        store(module)


def _roundings(
    model: Any,
    modules: list[str],
    layers: Mapping[str, Any],
    calibration: Any,
    algorithm: Algorithm,
) -> Iterator[tuple[str, Callable[..., dict[str, np.ndarray]]]]:
    """How the kernel of each layer is rounded."""
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # There may be several passes.
    names = {id(layers[m]): m for m in modules}
    chosen = [layers[m] for m in modules]
    hessian = algorithm.needs_hessian
    for part in capture_in_passes(model, chosen, calibration, hessian=hessian):
        for key in list(part):
            statistics = part.pop(key)

            def rounding(
                format: PackedFormat,
                matrix: np.ndarray,
                group_size: int,
                statistics: Statistics = statistics,
            ) -> dict[str, np.ndarray]:
                return algorithm.round(format, matrix, statistics, group_size)

            yield names[key], rounding


def _changes(layer: Any, name: str | None, group_size: int | None) -> bool:
    """Whether a kernel gets new codes."""
    if name is None:
        return False
    name, group_size = layer.needed_format(name, group_size)
    return not layer.is_stored_as(kernel_format(name), group_size)


def _reason(layer: Any, name: str | None, algorithm: Algorithm) -> str:
    """Why a kernel is rounded to nearest."""
    if not isinstance(kernel_format(name), algorithm.serves):
        return f"{name} is rounded to nearest always"
    return unserved_reason(layer)


def _warn_of_rest(reasons: Mapping[str, str]) -> None:
    if not reasons:
        return
    by_reason: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        by_reason.setdefault(reason, []).append(module)
    texts = [
        f"{', '.join(found[:5])}{' ...' if found[5:] else ''} ({reason})"
        for reason, found in by_reason.items()
    ]
    warnings.warn(f"Not calibrated, but rounded to nearest: {'; '.join(texts)}.", stacklevel=4)
