"""What the updates of one adapter share across the layers of a model."""

from __future__ import annotations

from typing import Any

from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.methods import METHODS


def updates_of(model: Any, name: str) -> list[Any]:
    """The method's instances of one adapter in all layers of a model, in its order.

    Args:
        model: A model with LoRA layers.
        name: Name of the adapter.
    """
    return [
        update
        for layer in model._flatten_layers()
        if isinstance(layer, LoRALayer) and name in layer.adapters
        for update in layer.adapters[name].updates
    ]


def connect_adapter(model: Any, name: str) -> None:
    """Tells the updates of an adapter about the model, whose layers are built.

    Raises:
        ValueError: The adapter's options do not fit the model.
    """
    updates = updates_of(model, name)
    if updates:
        type(updates[0]).connect(model, name, updates)


def disconnect_adapter(model: Any, name: str, fields: Any) -> None:
    """Takes out of a model what an adapter has outside its layers.

    Args:
        model: The model.
        name: Name of the adapter.
        fields: Its config; ``None`` if it has got none yet.
    """
    methods = METHODS.values() if fields is None else [METHODS[fields.lora_method]]
    for method in methods:
        method.disconnect(model, name)
