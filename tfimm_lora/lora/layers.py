"""Adapted layers, each a subclass of the Keras layer it stands for."""

from __future__ import annotations

from typing import Any

import keras

from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.layer_adapter import KERNEL_ARGUMENTS, LORA_ARGUMENTS
from tfimm_lora.lora.operations import OPERATIONS


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LoRADense(LoRALayer, keras.layers.Dense):
    """``keras.layers.Dense`` with a low-rank update: ``x W + (alpha / r) (x A) B + b``.

    Paper: LoRA, arXiv:2106.09685. A, ``kernel_lora_a``, is (in, r); B, ``kernel_lora_b``, is
    (r, units) and starts at zero. The kernel is frozen.

    Args:
        units: Number of outputs.
        lora_rank: Rank r. Defaults to 4.
        lora_alpha: Scaling is alpha / r; ``None`` means r. Defaults to ``None``.
        lora_method: See :class:`~tfimm_lora.lora.LoRAConfig`; ``None`` for a layer that has no
            adapter yet. Defaults to ``lora``.
        lora_dropout: Dropout on the input of the low-rank path. Defaults to 0.0.
        lora_init: Initialisation of A. Defaults to the method's.
        lora_options: The method's own options. Defaults to ``None``.
        lora_train_bias: ``none`` freezes the bias, anything else trains it. Defaults to ``none``.
        lora_slices: Adapt slices of the outputs instead of all: a dictionary from the slice's name
            to ``{"index": i, "of": n}``, the i-th of n equal parts, with ``rank`` and ``alpha``
            where they differ. Defaults to ``None``.
        lora_adapters: Arguments of further adapters, by name. Defaults to ``None``.
        lora_active: Names of the adapters that act. Defaults to the first one.
        lora_quantization: Format of the frozen kernel: ``fake-int8``, ``fake-int4``, ``int8``,
            ``int4``, ``nf4``, see :class:`~tfimm_lora.lora.LoRAConfig`; ``None`` for float.
        lora_group_size: Rows of the kernel that share a scale; has to divide its rows. Defaults to
            one scale per output (``nf4``: 64, or the nearest divisor).
        lora_quantize_merged: With a fake format, round the kernel together with the update.
            Defaults to ``False``.
        **kwargs: All other arguments of ``keras.layers.Dense``.

    Raises:
        ValueError: The rank is no positive integer or the method is unknown.

    Example:
        >>> y = LoRADense(10, lora_rank=2)(x)     # (..., in) -> (..., 10)
    """

    operation = OPERATIONS[keras.layers.Dense]


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LoRAConv2D(LoRALayer, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` with a low-rank update.

    A, ``kernel_lora_a``, is a convolution of the kernel's geometry, (h, w, in / groups, r); B,
    ``kernel_lora_b``, is a 1x1 convolution, (r / groups, filters), that starts at zero. Strides,
    padding, dilation and groups are those of the layer; the rank has to be a multiple of the
    groups.

    Args:
        filters: Number of filters.
        kernel_size: Height and width of the kernel.
        **kwargs: The ``lora_`` arguments of :class:`LoRADense` and all other arguments of
            ``keras.layers.Conv2D``.

    Raises:
        ValueError: As for :class:`LoRADense`; or, when built, the rank is no multiple of the
            groups.

    Example:
        >>> y = LoRAConv2D(64, 3, lora_rank=8)(x)     # (b, h, w, c) -> (b, h - 2, w - 2, 64)
    """

    operation = OPERATIONS[keras.layers.Conv2D]


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LoRADepthwiseConv2D(LoRALayer, keras.layers.DepthwiseConv2D):
    """``keras.layers.DepthwiseConv2D`` with an update that is a depthwise kernel again.

    A, ``kernel_lora_a``, holds r filters, (h, w, r); B, ``kernel_lora_b``, mixes them for every
    channel, (r, channels), and starts at zero.

    Args:
        kernel_size: Height and width of the kernel.
        **kwargs: The ``lora_`` arguments of :class:`LoRADense` and all other arguments of
            ``keras.layers.DepthwiseConv2D``.

    Raises:
        ValueError: As for :class:`LoRADense`.

    Example:
        >>> y = LoRADepthwiseConv2D(7, padding="same", lora_rank=2)(x)
    """

    operation = OPERATIONS[keras.layers.DepthwiseConv2D]


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LoRAEinsumDense(LoRALayer, keras.layers.EinsumDense):
    """``keras.layers.EinsumDense`` with a low-rank update.

    The kernel is seen as a matrix from the axes that are summed over to the new ones.

    Args:
        equation: The einsum equation; its kernel may have no axis that is neither summed over nor
            new.
        output_shape: Shape of the output without batch.
        **kwargs: The ``lora_`` arguments of :class:`LoRADense` and all other arguments of
            ``keras.layers.EinsumDense``.

    Raises:
        ValueError: As for :class:`LoRADense`; or, when built, the equation has no such matrix.

    Example:
        >>> y = LoRAEinsumDense("abc,cde->abde", (None, 4, 16), lora_rank=2)(x)
    """

    operation = OPERATIONS[keras.layers.EinsumDense]


_LORA_LAYERS: dict[type, type] = {
    cls.operation.layer_class: cls
    for cls in (LoRADense, LoRAConv2D, LoRADepthwiseConv2D, LoRAEinsumDense)
}


def is_adaptable(layer: Any) -> bool:
    """Whether a layer is a LoRA layer or has a LoRA version (subclasses of Keras' have none)."""
    return type(layer) in _LORA_LAYERS or isinstance(layer, LoRALayer)


def convert_to_lora_layer(layer: keras.layers.Layer, **lora: Any) -> keras.layers.Layer:
    """Creates the LoRA version of a layer.

    Args:
        layer: A ``Dense``, ``Conv2D``, ``DepthwiseConv2D`` or ``EinsumDense``. If it is built, the
            new layer is built as well and has its weights.
        **lora: ``lora_`` arguments, see :class:`LoRADense`.

    Returns:
        A new layer; ``layer`` is not changed.

    Raises:
        ValueError: The layer has no LoRA version, or has one of Keras' own adapters.

    Example:
        >>> lora_layer = convert_to_lora_layer(keras.layers.Dense(10), lora_rank=2)
    """
    if type(layer) not in _LORA_LAYERS:
        already = " It is one already." if isinstance(layer, LoRALayer) else ""
        raise ValueError(
            f"Layer {layer.name!r} of type {type(layer).__name__} has no LoRA version.{already} "
            f"Supported: {', '.join(sorted(c.__name__ for c in _LORA_LAYERS))}."
        )
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"Layer {layer.name!r} has Keras' own LoRA weights (enable_lora). Build it without."
        )
    known = [*LORA_ARGUMENTS, *KERNEL_ARGUMENTS]
    unknown = set(lora) - set(known)
    if unknown:
        raise ValueError(f"Unknown arguments {sorted(unknown)}. Known: {', '.join(known)}.")
    config = {k: v for k, v in layer.get_config().items() if k not in LORA_ARGUMENTS}
    lora_class: Any = _LORA_LAYERS[type(layer)]
    new = lora_class.from_config({**config, **lora})
    if layer.built:
        new.build(layer.get_build_config()["input_shape"])
        new.kernel.assign(layer.kernel)
        if layer.bias is not None:
            new.bias.assign(layer.bias)
    return new
