"""Merging and unmerging all updates of a model."""

from __future__ import annotations

from typing import Any

import keras

from tfimm_lora.lora.layer import is_adapted


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


def _forget_compiled(model: keras.layers.Layer) -> None:
    """Makes Keras trace anew, so that merged layers cost no more than regular ones."""
    if isinstance(model, keras.Model):
        model.train_function = model.test_function = model.predict_function = None


def merge_lora_weights(model: keras.layers.Layer) -> None:
    """Adds all updates of a model to its kernels, in place.

    Files saved while weights are merged hold the unmerged state. Methods that work in place
    (``bitfit``, ``full``, ...) leave nothing to add: what they train are the model's own weights,
    so that a model with nothing else stays as it is.

    Args:
        model: A built model with LoRA layers.

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
    for layer in layers:
        layer.merge_weights()
    _forget_compiled(model)


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
    _forget_compiled(model)
