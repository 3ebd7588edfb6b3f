"""Turning a LoRA model into a regular one, with the updates merged into its kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from keras import ops

from tfimm_lora.architectures.config import base_config_values
from tfimm_lora.lora.config import split_lora_values
from tfimm_lora.lora.functional import (
    LoRAFunctional,
    quantized_functional_model,
    regular_functional_model,
)
from tfimm_lora.lora.grouped_update import merge_into_zero_points, merges_exactly
from tfimm_lora.lora.keeps_adapters import KeepsAdapters
from tfimm_lora.lora.layer import LoRALayer, is_adapted
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.merge_drift import model_outputs, report_drift
from tfimm_lora.lora.registry import lora_base_architecture
from tfimm_lora.models.factory import build_model
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.quantization.format import FakeFormat
from tfimm_lora.quantization.integer import FakeIntegerFormat, IntegerFormat
from tfimm_lora.quantization.models import build_quantized_model
from tfimm_lora.quantization.planning import storing_layers
from tfimm_lora.weights.names import LORA_WEIGHT_NAMES, iterate_layers, named_variables, timm_path


def convert_to_regular_model(
    model: keras.Model, keep_quantized: bool = False, calibration: Any = None
) -> keras.Model:
    """Creates the regular version of a LoRA model, with the updates merged into its kernels.

    Quantised kernels are dequantised and merged, so that outputs stay the same, unless
    ``keep_quantized``: then the result is packed as the model is (fake formats become packed).
    Zero points take up the updates of QA-LoRA exactly. Kernels with other updates are rounded
    again; by how much outputs change is measured, kept as ``merge_drift`` of the result (see
    :class:`~tfimm_lora.lora.MergeDrift`) and told by a warning.

    Args:
        model: A LoRA model, merged or not; it is not changed.
        keep_quantized: Keep the kernels packed. Defaults to ``False``.
        calibration: Inputs, (images, height, width, channels), on which the change is measured.
            Defaults to 8 images of noise.

    Returns:
        A built model of the regular class (with ``keep_quantized``, of its quantised variant, or a
        functional model with quantised layers) with the same outputs.

    Raises:
        ValueError: The model is no LoRA model; or, with ``keep_quantized``, no kernel is
            quantised, the class has no quantised variant, or a composite layer of a functional
            model has a packed kernel inside.

    Example:
        >>> regular = convert_to_regular_model(lora_model)
    """
    if isinstance(model, FeatureExtractor):
        backbone = convert_to_regular_model(model.backbone, keep_quantized, calibration)
        return model.replace_backbone(backbone)
    if not (isinstance(model, KeepsAdapters) or lora_layers(model)):
        raise ValueError(f"{model.name!r} has no LoRA layers; it is a regular model already.")
    if keep_quantized:
        return _quantized(model, calibration)
    copy = partial(transfer_weights, model, weights_to_ignore=LORA_WEIGHT_NAMES)
    if isinstance(model, LoRAFunctional):
        regular = regular_functional_model(model)
        copy(regular)
    else:
        base_cls: Any = lora_base_architecture(type(model))
        values = base_config_values(model.cfg, base_cls.cfg_class)
        cfg = base_cls.cfg_class(**split_lora_values(values)[1])
        regular = build_model(base_cls, cfg, getattr(model, "pretrained_cfg", None), copy)
    variables = {v.path: v.variable for v in named_variables(regular)}
    for v in named_variables(model):
        if v.leaf in ("kernel", "bias") and (is_adapted(v.layer) or _is_rounded(v.layer)):
            value = v.layer.adapted_kernel() if v.leaf == "kernel" else v.layer.adapted_bias()
            variables[v.path].assign(ops.convert_to_numpy(value))
    return regular


def _is_rounded(layer: Any) -> bool:
    """Whether a layer computes with another kernel than the one it stores."""
    return isinstance(layer, LoRALayer) and isinstance(layer.kernel_format, FakeFormat)


def _quantized(model: keras.Model, calibration: Any) -> keras.Model:
    """The regular model with packed kernels."""
    layers: dict[str, Any] = dict(storing_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "The adapters are merged. Use lora.unmerge_lora_weights(model) first, so that the "
            "kernels are packed again."
        )
    formats = {module: _packed(layer) for module, layer in layers.items()}
    if not any(formats.values()):
        raise ValueError(
            "keep_quantized=True, but no kernel of the model is quantised. Use "
            "lora.quantize(model, 'int8'), say, before training."
        )
    copy = partial(transfer_weights, model, weights_to_ignore=LORA_WEIGHT_NAMES)
    if isinstance(model, LoRAFunctional):
        regular = quantized_functional_model(model, formats)
        copy(regular)
    else:
        base_cls: Any = lora_base_architecture(type(model))
        values = split_lora_values(base_config_values(model.cfg, base_cls.cfg_class))[1]
        facts = getattr(model, "pretrained_cfg", None)
        regular = build_quantized_model(base_cls, values, formats, None, facts, copy)
    targets: dict[str, Any] = {timm_path(path): layer for path, layer in iterate_layers(regular)}
    rounded = []
    for module, layer in layers.items():
        target = targets[module]
        if is_adapted(layer) and target.bias is not None:
            target.bias.assign(ops.convert_to_numpy(layer.adapted_bias()))
        if not is_adapted(layer) or merge_into_zero_points(target.kernel, layer.updates):
            continue
        kernel = layer.adapted_kernel()
        if layer.lora_quantize_merged:
            # What is rounded in training is what is rounded now.
            kernel = layer.composed_kernel(ops.convert_to_tensor(layer.kernel))
        elif formats[module] is not None:
            rounded.append(module)
        target.kernel.assign(ops.convert_to_numpy(kernel))
    before = partial(model_outputs, model)
    report_drift(regular, before, partial(model_outputs, regular), rounded, calibration)
    return regular


def _packed(layer: Any) -> str | None:
    """The packed format that a layer's kernel has after merging, with its group size."""
    format = layer.kernel_format
    if format is None:
        return None
    format = format.packed_format if isinstance(format, FakeIntegerFormat) else format
    if isinstance(format, IntegerFormat) and layer.updates and merges_exactly(layer):
        format = format.asymmetric
    return f"{format.name}/{layer.group_size}"
