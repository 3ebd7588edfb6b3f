"""Putting one layer in the place of another, inside a layer that holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def parent_of(model: keras.layers.Layer, child: keras.layers.Layer) -> keras.layers.Layer:
    """Returns the layer that holds ``child`` directly.

    Raises:
        ValueError: No layer below ``model`` holds it.
    """
    for parent in (model, *model._flatten_layers(include_self=False)):
        if any(c is child for c in parent._flatten_layers(include_self=False, recursive=False)):
            return parent
    raise ValueError(f"Layer {child.name!r} is not part of {model.name!r}.")


def replace_sublayer(
    parent: keras.layers.Layer, old: keras.layers.Layer, new: keras.layers.Layer
) -> None:
    """Replaces ``old`` by ``new`` in all attributes of ``parent``, lists and dicts included.

    ``old`` leaves Keras' tracking, so that no unbuilt or unused layer stays behind. Built parents
    are unlocked for the exchange.

    Args:
        parent: The layer that holds ``old``.
        old: The layer to take out.
        new: The layer to put in.

    Raises:
        ValueError: ``parent`` holds ``old`` in no attribute.
    """
    tracker = parent._tracker
    locked = tracker.locked
    position = next(i for i, c in enumerate(parent._layers) if c is old)
    tracker.unlock()
    tracker.untrack(old)
    found = False
    for name, value in list(vars(parent).items()):
        if value is old:
            setattr(parent, name, new)
            found = True
        elif isinstance(value, (list, dict)) and name != "_layers":
            kind: Any = list if isinstance(value, list) else dict
            items = list(enumerate(value) if kind is list else value.items())  # type: ignore
            for key, item in items:
                if item is old:
                    # The plain method: Keras' tracked containers would not track the new item.
                    kind.__setitem__(value, key, new)
                    tracker.track(new)
                    found = True
    # Order of layers is order of weights.
    if found:
        layers = parent._layers
        layers.insert(position, layers.pop(next(i for i, c in enumerate(layers) if c is new)))
    if locked:
        tracker.lock()
    if not found:
        raise ValueError(f"{parent.name!r} holds {old.name!r} in no attribute, list or dictionary.")


def replace_layers(
    model: keras.layers.Layer, convert: Callable[[keras.layers.Layer], keras.layers.Layer | None]
) -> None:
    """Replaces layers of an unbuilt model by others.

    Args:
        model: A model that is not built.
        convert: Returns what comes in a layer's place, or ``None`` to leave it.
    """
    for parent in (model, *model._flatten_layers(include_self=False)):
        for layer in list(parent._flatten_layers(include_self=False, recursive=False)):
            new = convert(layer)
            if new is not None:
                replace_sublayer(parent, layer, new)
