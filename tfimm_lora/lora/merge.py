"""Merging and unmerging all updates of a model."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras

from tfimm_lora.lora.layer import is_adapted
from tfimm_lora.lora.merge_drift import calibration_images, model_outputs, report_drift


def lora_layers(model: keras.layers.Layer) -> list[Any]:
    """Returns the layers of a model that have an adapter, in its order.

    Args:
        model: Any model or layer.

    Example:
        >>> ranks = {layer.path: layer.lora_rank for layer in lora_layers(model)}
    """
    return [layer for layer in model._flatten_layers() if is_adapted(layer)]


def _require(model: keras.layers.Layer) -> list[Any]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{model.name!r} has no LoRA layers. Use lora.convert_to_lora_model(model) first."
        )
    for part in model._flatten_layers():
        state = getattr(part, "_adapter_state", None)
        if state is not None:
            state.check_enabled()
    return layers


def _trains_in_place(model: keras.layers.Layer) -> bool:
    """Whether a model has adapters, but none with an update."""
    return getattr(model, "_adapter_state", None) is not None and not lora_layers(model)


def forget_compiled(model: keras.layers.Layer) -> None:
    """Makes Keras trace anew, so that merged layers cost no more than regular ones."""
    if isinstance(model, keras.Model):
        model.train_function = model.test_function = model.predict_function = None


def merge_lora_weights(
    model: keras.layers.Layer, requantize: bool = False, calibration: Any = None
) -> None:
    """Adds all updates of a model to its kernels, in place.

    Quantised kernels are float ones while they are merged, unless they are to be rounded again:
    then the change of the outputs is measured, kept as ``model.merge_drift`` (a
    :class:`~tfimm_lora.lora.MergeDrift`) and told by a warning.

    Files saved while weights are merged hold the unmerged state. Methods that work in place
    (``bitfit``, ``full``, ...) leave nothing to add: what they train are the model's own weights,
    so that a model with nothing else stays as it is.

    Args:
        model: A built model with LoRA layers.
        requantize: Keep the format of quantised kernels. Zero points take up the updates of
            QA-LoRA exactly; kernels with other updates are rounded again. Defaults to ``False``.
        calibration: Inputs, (images, height, width, channels), on which the change is measured.
            Defaults to 8 images of noise.

    Raises:
        ValueError: There are no LoRA layers, or all are merged already.

    Example:
        >>> merge_lora_weights(model)
    """
    if _trains_in_place(model):
        return
    layers = [layer for layer in _require(model) if not layer.merged]
    if not layers:
        raise ValueError("The LoRA weights of this model have already been merged.")
    measured = requantize and any(layer.kernel_format is not None for layer in layers)
    before = []
    if measured:
        before = model_outputs(model, calibration_images(model, calibration))
    rounded = [layer.path for layer in layers if layer.merge_weights(requantize)]
    forget_compiled(model)
    if measured:
        after = partial(model_outputs, model)
        report_drift(model, lambda _: before, after, rounded, calibration)


def unmerge_lora_weights(model: keras.layers.Layer) -> None:
    """Restores the state in front of :func:`merge_lora_weights`, to the bit.

    Args:
        model: A model with merged LoRA layers.

    Raises:
        ValueError: There are no LoRA layers, or none is merged.

    Example:
        >>> unmerge_lora_weights(model)
    """
    if _trains_in_place(model):
        return
    layers = [layer for layer in _require(model) if layer.merged]
    if not layers:
        raise ValueError("The LoRA weights of this model are not merged.")
    for layer in layers:
        layer.unmerge_weights()
    forget_compiled(model)
