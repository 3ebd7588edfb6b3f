"""Storing the frozen kernels of a LoRA model in another format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.first_updates import initialize_adapters
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.merge import forget_compiled
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.trainable import fully_trained_layers, own_config
from tfimm_lora.quantization.calibrated import calibrated_formats, store_kernels
from tfimm_lora.quantization.planning import (
    Quantization,
    by_pattern,
    check_formats,
    check_group_sizes,
    plan_formats,
    storing_layers,
)
from tfimm_lora.quantization.registry import kernel_format, split_group_size


def quantize(
    model: keras.Model,
    quantization: Quantization,
    group_size: int | None = None,
    *,
    calibration: Any = None,
    algorithm: str | None = None,
    quantize_merged: bool = False,
    keep_adapters: bool = False,
) -> None:
    """Stores the frozen kernels of a LoRA model in another format, in place.

    Kernels that are trained in full stay in float, and those that would not become half as large,
    which a warning names. Kernels that are stored as wanted already stay as they are. Compiled
    functions are made anew at their next use.

    Args:
        model: A built LoRA model.
        quantization: Name of a format for all kernels, or a dictionary from patterns on the timm
            path (names or wildcards, of a layer or of what it is below) to names; the first pattern
            that matches counts, ``None`` stands for float, and layers that match none stay as they
            are.
        group_size: See ``lora_group_size`` of :class:`~tfimm_lora.lora.LoRAConfig`.
        calibration: Images that are like those the model will see, normalised, (n, height, width,
            channels), or batches of them one after the other (of tuples the first element counts).
            Codes are chosen so that what layers give for these images changes little. Dense
            layers and convolutions without groups are served; the others are rounded to nearest,
            and a warning names them. Defaults to ``None``: all are rounded to nearest.
        algorithm: With calibration, ``gptq`` (arXiv:2210.17323), the default, for all integer
            formats that are packed; or ``awq`` (arXiv:2306.00978), with which ``int8`` and
            ``int4`` become ``int8-row-scaled`` and ``int4-row-scaled``.
        quantize_merged: See ``lora_quantize_merged``.
        keep_adapters: Quantise although adapters have been trained on the kernels as they are,
            and no longer fit exactly. Defaults to ``False``.

    Raises:
        ValueError: A format is unknown, a pattern matches nothing, a group size fits no kernel, a
            kernel is not finite, adapters are merged, or they are trained; an algorithm is unknown,
            without images, or serves no kernel; or images are missing or not finite.

    Example:
        >>> quantize(model, {"head": None, "*": "int4"}, group_size=64, calibration=images)
    """
    layers = [la for la in model._flatten_layers() if isinstance(la, LoRALayer)]
    if not layers:
        raise ValueError(
            f"{model.name!r} is no LoRA model. Use lora.convert_to_lora_model(model, "
            f"lora_quantization={quantization!r}), or quantization.convert_to_quantized_model for "
            "a model without adapters."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The adapters are merged into the kernels. Use lora.unmerge_lora_weights(model) first."
        )
    if not keep_adapters:
        _check_untrained(layers)
    quantization = calibrated_formats(quantization, calibration, algorithm)
    cfg = own_config(model) if hasattr(model, "_adapter_state") else None
    if cfg is not None and not hasattr(cfg, "lora_quantization"):
        raise ValueError(
            f"{type(cfg).__name__} has no field lora_quantization, so a saved model could not be "
            "loaded again. Let it inherit from lora.LoRAConfig."
        )
    if cfg is not None and isinstance(quantization, Mapping):
        # What matches no pattern stays as it is, also in the config.
        before = by_pattern(cfg.lora_quantization)
        before = {p: _with_size(f, cfg.lora_group_size) for p, f in before.items()}
        quantization = {p: _with_size(f, group_size) for p, f in quantization.items()}
        quantization |= {p: f for p, f in before.items() if p not in quantization}
        group_size = None
    planned = assign_formats(
        model, quantization, group_size, quantize_merged, calibration, algorithm
    )
    check_formats(model, planned, "group_size")
    if cfg is not None:
        cfg.lora_quantization, cfg.lora_group_size = quantization, group_size
        cfg.lora_quantize_merged = quantize_merged
    initialize_adapters(model)
    forget_compiled(model)
    state: AdapterState | None = getattr(model, "_adapter_state", None)
    if state is not None:
        state.functions.clear()
        state.set_flags(model)


def _with_size(format: str | None, group_size: int | None) -> str | None:
    """The format with its group size."""
    name, size = split_group_size(format, group_size)
    return name if size is None else f"{name}/{size}"


def _check_untrained(layers: Iterable[LoRALayer]) -> None:
    for layer in layers:
        for name, adapter in layer.adapters.items():
            if any(update.acts for update in adapter.updates):
                raise ValueError(
                    f"{layer.path}: the adapter {name!r} has been trained on the kernel as it is. "
                    "Quantise before training; or merge it (lora.convert_to_regular_model) and "
                    "convert the result with lora_quantization; or pass keep_adapters=True and "
                    "accept that outputs change."
                )


def assign_formats(
    model: Any,
    quantization: Quantization,
    group_size: int | None,
    quantize_merged: bool = False,
    calibration: Any = None,
    algorithm: str | None = None,
    adapting: Mapping[str, tuple[type[Method], Mapping[str, Any]]] | None = None,
) -> dict[str, tuple[str | None, int | None]]:
    """Stores kernels as :func:`quantize` does; the layers may be unbuilt.

    Args:
        model: See :func:`quantize`.
        quantization: See :func:`quantize`.
        group_size: See :func:`quantize`.
        quantize_merged: See :func:`quantize`.
        calibration: See :func:`quantize`.
        algorithm: See :func:`quantize`.
        adapting: Methods, with their options, of adapters that are still to be added, by timm path.

    Returns:
        Formats and group sizes by timm path, for :func:`check_formats`.

    Raises:
        ValueError: See :func:`quantize`.
    """
    state: AdapterState | None = getattr(model, "_adapter_state", None)
    fields = {} if state is None else state.fields
    trained = [m for name, f in fields.items() for m in fully_trained_layers(model, name, f)]
    layers = storing_layers(model)
    planned = plan_formats(model, quantization, group_size, trained)
    for module, (method, options) in (adapting or {}).items():
        if module in planned:
            planned[module] = method.kernel_format(*planned[module], options)
    for name, size in planned.values():
        for f in fields.values():
            if METHODS[f.lora_method].in_place:
                METHODS[f.lora_method].kernel_format(name, size, f.lora_options)
    if model.built:  # An error leaves the model as it was.
        check_group_sizes(model, planned, "group_size")
        for module, (name, _) in planned.items():
            layers[module].check_kernel(name)

    def store(module: str) -> None:
        layer: Any = layers[module]
        name, size = planned[module]
        format = kernel_format(name)
        merged = quantize_merged and format is not None and not format.packed
        try:
            layer.store_kernel_as(name, size, merged, fit=True)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error

    store_kernels(model, planned, store, calibration, algorithm)
    return planned
