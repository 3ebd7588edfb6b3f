"""Copying weights from one model to another, by path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import keras

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.weights.adapt import adapt_weight, is_below
from tfimm_lora.weights.first_values import assign_all
from tfimm_lora.weights.loading import check_names
from tfimm_lora.weights.names import is_stored, named_variables, variable_value


def transfer_weights(
    src_model: keras.Model, dst_model: keras.Model, weights_to_ignore: Iterable[str] | None = None
) -> None:
    """Copies weights between two models whose layers have the same paths.

    First convolution, position table and classifier are treated as when a checkpoint is loaded: a
    classifier with another number of classes stays fresh. Works for subclassed, functional and
    Sequential models.

    Args:
        src_model: The model to copy from; it is not changed.
        dst_model: The model to copy to, built; modified in place.
        weights_to_ignore: Regular expressions; weights of the destination whose path (for example
            ``blocks_0/attn/qkv/kernel_lora_a``) contains one of them are left as they are.

    Raises:
        ValueError: A weight of either model is missing in the other, or shapes differ.

    Example:
        >>> transfer_weights(model, lora_model, weights_to_ignore=lora.LORA_WEIGHT_NAMES)
    """
    ignored = [re.compile(p) for p in weights_to_ignore or ()]

    def wanted(path: str) -> bool:
        return not any(pattern.search(path) for pattern in ignored)

    source = {v.name: v for v in named_variables(src_model) if wanted(v.path)}
    target = {v.name: v for v in named_variables(dst_model) if wanted(v.path)}
    src_cfg, dst_cfg = getattr(src_model, "cfg", None), getattr(dst_model, "cfg", None)
    if getattr(src_cfg, "nb_classes", None) != getattr(dst_cfg, "nb_classes", None):
        classifier = classifier_paths(dst_cfg)
        source = {n: v for n, v in source.items() if not is_below(n, classifier)}
        target = {n: v for n, v in target.items() if not is_below(n, classifier)}
    check_names(set(target) - set(source), set(source) - set(target), f"{src_model.name!r}")
    size = getattr(src_cfg, "input_size", None)

    def value_of(name: str) -> Any:
        old, new = source[name].variable, target[name].variable
        if is_stored(new) and new.same_storage(old):
            return old
        value, shape = variable_value(old), new.shape
        return adapt_weight(dst_model, name, value, tuple(shape), size)

    assign_all((entry.variable, partial(value_of, name)) for name, entry in target.items())
    # Models with adapters keep copies of some of the base model's weights.
    if hasattr(dst_model, "weights_transferred"):
        dst_model.weights_transferred(src_model)
