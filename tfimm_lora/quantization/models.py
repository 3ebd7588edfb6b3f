"""Regular models whose kernels are packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from tfimm_lora.architectures.config import ModelConfig, base_config_values, make_config
from tfimm_lora.architectures.convnext import ConvNeXt, ConvNeXtConfig
from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.architectures.vit import ViT
from tfimm_lora.architectures.vit_config import ViTConfig
from tfimm_lora.models.factory import build_model
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.models.replace import replace_layers
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.quantization.calibrated import calibrated_formats, store_kernels
from tfimm_lora.quantization.layers import QUANTIZED_LAYERS
from tfimm_lora.quantization.planning import (
    Quantization,
    by_pattern,
    check_formats,
    plan_formats,
    storing_layers,
)
from tfimm_lora.quantization.recompute import ExportsKernels
from tfimm_lora.quantization.registry import kernel_format, split_group_size

_quantized_class: dict[type, type] = {}


@dataclasses.dataclass
class QuantizationConfig(ModelConfig):
    """Fields that say how kernels are stored, to be mixed into the config of an architecture.

    Attributes:
        quantization: ``int8``, ``int4`` or ``nf4`` for all kernels, or a dictionary from patterns
            on the timm path to formats or ``None`` (float), of which the first that matches counts.
        group_size: Rows that share a scale; where they do not divide a kernel's rows, the nearest
            divisor is taken. ``None`` for one scale per output channel (``nf4``: 64).

    Raises:
        ValueError: A format is unknown or a fake one.

    Example:
        >>> QuantizedViTConfig(quantization="int4", group_size=64)
    """

    quantization: str | dict[str, str | None] | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in by_pattern(self.quantization).values():
            name, _ = split_group_size(text, self.group_size, "quantization")
            format = kernel_format(name)
            if format is not None and not format.packed:
                raise ValueError(
                    f"quantization={name!r} is for training with lora_quantization. Use "
                    f"{format.name.removeprefix('fake-')!r}."
                )


def _quantized(layer: Any) -> Any:
    cls: Any = QUANTIZED_LAYERS.get(type(layer))
    return None if cls is None else cls.from_config(layer.get_config())


class QuantizedModel(ExportsKernels):
    """Mixin in front of an architecture: ``class QuantizedViT(QuantizedModel, ViT)``.

    Example:
        >>> @keras_serializable
        ... @register_quantized_architecture
        ... class QuantizedViT(QuantizedModel, ViT):
        ...     cfg_class = QuantizedViTConfig
    """

    cfg: Any

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)  # type: ignore[call-arg]
        replace_layers(self, _quantized)

    def build(self, input_shape: Any) -> None:
        """Builds the architecture with packed kernels."""
        cfg, layers = self.cfg, storing_layers(self)
        planned = plan_formats(self, cfg.quantization, cfg.group_size, field="quantization")
        for module, (name, size) in planned.items():
            layers[module].store_kernel_as(name, size, fit=True)  # type: ignore[attr-defined]
        super().build(input_shape)  # type: ignore[misc]
        check_formats(self, planned, "group_size")


def register_quantized_architecture(cls: type) -> type:
    """Decorator that registers a class as the quantised variant of an architecture.

    The base class is the next class with a config in the order of inheritance.

    Args:
        cls: The variant, with a ``cfg_class`` that inherits from :class:`QuantizationConfig`.

    Example:
        >>> @keras_serializable
        ... @register_quantized_architecture
        ... class QuantizedViT(QuantizedModel, ViT):
        ...     cfg_class = QuantizedViTConfig
    """
    base = next(c for c in cls.__mro__[1:] if "cfg_class" in vars(c))
    _quantized_class[base] = cls
    return cls


def quantized_architecture(model_cls: type) -> type:
    """Returns the quantised variant of a model class.

    Raises:
        ValueError: The class has none.

    Example:
        >>> quantized_architecture(ConvNeXt).__name__
        'QuantizedConvNeXt'
    """
    if model_cls not in _quantized_class:
        raise ValueError(
            f"{model_cls.__name__} has no quantised variant. Register one with "
            "@quantization.register_quantized_architecture."
        )
    return _quantized_class[model_cls]


def quantized_base_architecture(quantized_cls: type) -> type:
    """Returns the regular class of a quantised variant.

    Raises:
        ValueError: The class is no registered quantised variant.

    Example:
        >>> quantized_base_architecture(QuantizedViT).__name__
        'ViT'
    """
    for base, variant in _quantized_class.items():
        if variant is quantized_cls:
            return base
    raise ValueError(f"{quantized_cls.__name__} is not registered as quantised variant of a class.")


def build_quantized_model(
    base_cls: type,
    values: dict[str, Any],
    quantization: Quantization,
    group_size: int | None,
    facts: Any,
    load: Callable[[keras.Model], Any],
) -> keras.Model:
    """Constructs and builds the quantised variant of a model class.

    Args:
        base_cls: The regular class.
        values: Fields of its config.
        quantization: See :class:`QuantizationConfig`.
        group_size: See :class:`QuantizationConfig`.
        facts: See :func:`~tfimm_lora.models.factory.build_model`.
        load: Gives the built model its weights.
    """
    cls: Any = quantized_architecture(base_cls)
    fields = {"quantization": quantization, "group_size": group_size}
    return build_model(cls, make_config(cls.cfg_class, values, fields), facts, load)


def convert_to_quantized_model(
    model: keras.Model,
    quantization: Quantization,
    group_size: int | None = None,
    *,
    calibration: Any = None,
    algorithm: str | None = None,
) -> keras.Model:
    """Creates a model with packed kernels from a regular one.

    Args:
        model: A built regular model of the zoo or of a registered class; it is not changed.
        quantization: See :class:`QuantizationConfig`.
        group_size: See :class:`QuantizationConfig`.
        calibration: Images, see :func:`~tfimm_lora.lora.quantize`. Defaults to ``None``: kernels
            are rounded to nearest.
        algorithm: With calibration, ``gptq`` (the default) or ``awq``, see
            :func:`~tfimm_lora.lora.quantize`.

    Returns:
        A built model of the quantised variant, for inference.

    Raises:
        ValueError: The model's class has no quantised variant, a format is unknown, a pattern
            matches nothing, or a kernel is not finite; an algorithm is unknown, without images, or
            serves no kernel; or images are missing or not finite.

    Example:
        >>> small = convert_to_quantized_model(model, "int4", group_size=64, calibration=images)
    """
    if isinstance(model, FeatureExtractor):
        backbone = convert_to_quantized_model(
            model.backbone,
            quantization,
            group_size,
            calibration=calibration,
            algorithm=algorithm,
        )
        return model.replace_backbone(backbone)
    cls: Any = quantized_architecture(type(model))
    values = base_config_values(model.cfg, cls.cfg_class)
    facts, copy = getattr(model, "pretrained_cfg", None), partial(transfer_weights, model)
    build = partial(build_quantized_model, type(model), values, facts=facts, load=copy)
    quantization = calibrated_formats(quantization, calibration, algorithm)
    if calibration is None:
        return build(quantization, group_size)
    wanted = make_config(
        cls.cfg_class, values, {"quantization": quantization, "group_size": group_size}
    )
    quantized: Any = build(None, None)  # Images run through the float model.
    layers: dict[str, Any] = dict(storing_layers(quantized))
    planned = plan_formats(quantized, quantization, group_size, field="quantization")

    def store(module: str) -> None:
        layers[module].store_kernel_as(*planned[module], fit=True)

    store_kernels(quantized, planned, store, calibration, algorithm)
    check_formats(quantized, planned, "group_size")
    quantized.cfg = wanted
    return quantized


@dataclasses.dataclass
class QuantizedConvNeXtConfig(QuantizationConfig, ConvNeXtConfig):
    """:class:`~tfimm_lora.architectures.ConvNeXtConfig` with the fields of ``QuantizationConfig``.

    Example:
        >>> cfg = QuantizedConvNeXtConfig(quantization="int8")
    """


@keras_serializable
@register_quantized_architecture
class QuantizedConvNeXt(QuantizedModel, ConvNeXt):
    """A ConvNeXt with packed kernels.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model``.

    Example:
        >>> small = convert_to_quantized_model(create_model("convnext_tiny"), "int8")
    """

    cfg_class: Any = QuantizedConvNeXtConfig


@dataclasses.dataclass
class QuantizedViTConfig(QuantizationConfig, ViTConfig):
    """:class:`~tfimm_lora.architectures.ViTConfig` with the fields of ``QuantizationConfig``.

    Example:
        >>> cfg = QuantizedViTConfig(quantization="int4", group_size=64)
    """


@keras_serializable
@register_quantized_architecture
class QuantizedViT(QuantizedModel, ViT):
    """A ViT with packed kernels.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model``.

    Example:
        >>> small = convert_to_quantized_model(create_model("vit_small_patch16_224"), "nf4")
    """

    cfg_class: Any = QuantizedViTConfig
