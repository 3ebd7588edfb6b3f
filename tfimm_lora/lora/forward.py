"""How the updates of a layer's active adapters act on its outputs, and on its kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from tfimm_lora.lora.methods.base import Site
from tfimm_lora.lora.update import Update

Parts = list[tuple[Site, Update]]
"""An adapter's updates of one layer: one for the whole kernel, or one for each slice."""


def forward(layer: Any, inputs: Any, kernel: Any, acting: Sequence[tuple[Parts, Any]]) -> Any:
    """Applies the kernel and the active adapters, without bias and activation.

    Args:
        layer: The layer.
        inputs: Its inputs.
        kernel: Its frozen kernel.
        acting: For each active adapter its updates and the inputs of these, dropout applied.
    """
    if any(layer.operation.composes(layer, u) for parts, _ in acting for _, u in parts):
        return _composed(layer, inputs, kernel, acting)
    op = layer.operation
    sliced = [p for p, _ in acting if any(s.name and u.changes_inputs for s, u in p)]
    if sliced:
        # Every slice reads inputs of its own. Such adapters act alone.
        pieces = [
            op.apply_kernel(
                layer, inputs if u is None else op.transform_inputs(layer, inputs, u), own
            )
            for u, own in _split(sliced[0], kernel)
        ]
        outputs = ops.concatenate(pieces, axis=-1)
    else:
        changed = inputs
        for parts, _ in acting:
            for _, update in parts:
                changed = op.transform_inputs(layer, changed, update)
        own = kernel
        for parts, _ in acting:
            if any(update.gain_tangent is not None for _, update in parts):
                own = scaled(layer, own, parts)
        apply = functools.partial(op.apply_kernel, layer)
        whole = own is kernel
        outputs = layer.apply_frozen(apply, changed, kernel) if whole else apply(changed, own)
    for parts, dropped in acting:

        def finish(y: Any, update: Update, x: Any = dropped) -> Any:
            return op.finish(layer, y, x, update)

        outputs = by_site(parts, outputs, finish)
    return outputs


def _composed(layer: Any, inputs: Any, kernel: Any, acting: Sequence[tuple[Parts, Any]]) -> Any:
    """One kernel of everything, unless dropout or the precision keep the terms apart."""
    op = layer.operation
    for parts, _ in acting:
        kernel = scaled(layer, kernel, parts)
    apart, mixed = [], []
    for parts, dropped in acting:
        mixed += [(dropped, u) for _, u in parts if u.mixing is not None]
        term = additive(layer, [(s, dataclasses.replace(u, mixing=None)) for s, u in parts])
        if term is None:
            continue
        # In 16 bits a small update would be lost in the sum with the kernel.
        if dropped is inputs and layer.compute_dtype == "float32":
            kernel = kernel + term
        else:
            apart.append((dropped, ops.cast(term, inputs.dtype)))
    outputs = op.apply_kernel(layer, inputs, kernel)
    outputs = sum((op.apply_kernel(layer, x, term) for x, term in apart), start=outputs)
    for dropped, update in mixed:
        outputs = op.add_mixing(layer, outputs, dropped, update)
    return outputs


def forward_rounded(
    layer: Any, inputs: Any, kernel: Any, acting: Sequence[tuple[Parts, Any]]
) -> Any:
    """Applies the kernel with all updates in it, rounded as it will be when it is quantised.

    Args:
        layer: A layer with a fake format.
        inputs: Its inputs.
        kernel: Its frozen kernel, not rounded.
        acting: For each active adapter its updates; their inputs have no dropout.
    """
    op, composed = layer.operation, layer.composed_kernel(kernel)
    rounded = layer.fake_quantize(composed)
    updates = [(site, u) for parts, _ in acting for site, u in parts]
    if not all(u == Update(a=u.a, b=u.b) and not op.composes(layer, u) for _, u in updates):
        rounded = rounded + (composed - ops.stop_gradient(composed))
        return op.apply_kernel(layer, inputs, rounded)
    outputs = op.apply_kernel(layer, inputs, rounded)
    # What follows is zero, with the gradients of the factors: no full-size one is formed.
    fixed = ops.stop_gradient(inputs)
    tangent = ops.zeros_like(outputs)
    for parts, _ in acting:
        tangent = by_site(parts, tangent, lambda y, u: op.finish(layer, y, fixed, u))
    return outputs + (tangent - ops.stop_gradient(tangent))


def scaled(layer: Any, kernel: Any, parts: Parts) -> Any:
    """The kernel with an adapter's gains and rotations."""
    return by_site(parts, kernel, lambda k, u: layer.operation.scaled_kernel(layer, k, u))


def additive(layer: Any, parts: Parts) -> Any:
    """The terms of an adapter in the kernel's shape, or ``None``."""
    total = None
    outputs = layer.kernel.shape[-1]
    for site, update in parts:
        term = layer.operation.additive_kernel(layer, update)
        if term is not None and site.name:
            pad = [(0, 0)] * (len(term.shape) - 1)
            term = ops.pad(term, [*pad, (site.start, outputs - site.start - site.size)])
        total = term if total is None else total if term is None else total + term
    return total


def by_site(parts: Parts, value: Any, function: Callable[[Any, Update], Any]) -> Any:
    """Applies a function to what belongs to each update: all, or slices of the last axis."""
    if len(parts) == 1 and not parts[0][0].name:
        return function(value, parts[0][1])
    pieces = [v if u is None else function(v, u) for u, v in _split(parts, value)]
    return ops.concatenate(pieces, axis=-1)


def _split(parts: Parts, value: Any) -> list[tuple[Update | None, Any]]:
    """Cuts the last axis into the slices of the updates and the gaps between them."""
    pieces: list[tuple[Update | None, Any]] = []
    end = 0
    for site, update in parts:
        if site.start > end:
            pieces.append((None, value[..., end : site.start]))
        end = site.start + site.size if site.name else value.shape[-1]
        pieces.append((update, value[..., site.start : end]))
    if end < value.shape[-1]:
        pieces.append((None, value[..., end:]))
    return pieces
