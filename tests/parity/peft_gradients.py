"""Our gradients as gradients of PEFT's tensors, for any method.

A method's ``to_peft`` is a rearrangement of its variables, perhaps moved by a constant (the norm of
a kernel, where only the difference to it is trained). What it makes of a step along the gradient,
minus what it makes of the point itself, is therefore the gradient of PEFT's tensors.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.parity.adapters import PREFIX, gradients
from tests.parity.compare import timm_key, torch_layout

_FAR = 1000.0  # far enough that rounding the sum loses nothing of the step


def peft_gradients(
    model: keras.Model, images: np.ndarray, probe: np.ndarray
) -> dict[str, np.ndarray]:
    """Gradients of ``sum(logits * probe)`` by PEFT's name, in PEFT's layouts."""
    ours = gradients(model, images, probe)
    found: dict[str, np.ndarray] = {}
    adapted = {}
    for layer in model._flatten_layers():
        for update in [u for a in getattr(layer, "adapters", {}).values() for u in a.updates]:
            variable = next(iter(update.variables.values()))
            module = timm_key(variable.path).rpartition(".")[0]
            adapted[module] = True
            for end, value in _of_update(update, ours).items():
                found[f"{PREFIX}{module}.{end}"] = value
    own = {v.path for la in model._flatten_layers() for v in getattr(la, "lora_weights", [])}
    for path, gradient in ours.items():
        if path in own:
            continue
        module, _, leaf = timm_key(path).rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in adapted else f"{module}.{leaf}"
        found[PREFIX + key] = torch_layout(timm_key(path), gradient)
    return found


def _of_update(update: Any, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    steps = {n: ours[v.path] for n, v in update.variables.items() if v.path in ours}
    longest = max(float(np.abs(step).max()) for step in steps.values()) or 1.0
    values = {n: np.array(update.layer.unmerged_value(update.variables[n])) for n in steps}
    before = update.to_peft()
    for name, step in steps.items():
        update.variables[name].assign(values[name] + step * (_FAR / longest))
    after = update.to_peft()
    for name, value in values.items():
        update.variables[name].assign(value)
    moved = {end: (after[end] - before[end]) * (longest / _FAR) for end in after}
    return {end: value for end, value in moved.items() if np.any(value)}
