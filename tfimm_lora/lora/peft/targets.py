"""Which modules PEFT adapts: its rules, on the paths of a model's modules and the config alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

from tfimm_lora.layers.norm import NORMALIZATION_LAYERS
from tfimm_lora.weights.names import iterate_layers, timm_path
from tfimm_lora.weights.regex import fullmatch, match_start

ALL_LINEAR = "all-linear"
# What a method of PEFT can adapt; it raises for any other module that the config targets.
_KINDS = {
    "LORA": {"linear", "conv", "grouped"},
    "ADALORA": {"linear", "conv"},
    "LOHA": {"linear", "conv", "grouped"},
    "LOKR": {"linear", "conv", "grouped"},
    "VERA": {"linear"},
    "IA3": {"linear", "conv", "grouped"},
    "OFT": {"linear", "conv", "grouped"},
    "BOFT": {"linear", "conv"},
}


def module_kinds(model: keras.Model) -> dict[str, str]:
    """What the modules of a timm model are to PEFT.

    Args:
        model: A model of this package.

    Returns:
        ``linear``, ``conv``, ``grouped`` (a convolution with groups), ``norm`` or ``other`` by
        timm path, parents first.

    Example:
        >>> module_kinds(model)["blocks.0.attn.qkv"]
        'linear'
    """
    return {timm_path(path): _kind(layer) for path, layer in iterate_layers(model)}


def _kind(layer: Any) -> str:
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return "grouped"
    if isinstance(layer, keras.layers.Conv2D):
        return "conv" if layer.groups == 1 else "grouped"
    if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
        return "linear"
    return "norm" if isinstance(layer, NORMALIZATION_LAYERS) else "other"


def adapts(peft_type: str, layer: Any) -> bool:
    """Whether a method of PEFT has adapters for the kind of a layer.

    Args:
        peft_type: ``LORA``, say.
        layer: A Keras layer.

    Example:
        >>> adapts("VERA", keras.layers.Conv2D(8, 3))
        False
    """
    return peft_type not in _KINDS or _kind(layer) in _KINDS[peft_type]


def targeted_modules(config: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """Lists the modules that PEFT adapts.

    Args:
        config: Content of ``adapter_config.json``.
        kinds: What each module of the model is, by its path, see :func:`module_kinds`.

    Returns:
        Paths in the model's order.

    Raises:
        ValueError: The config names no targets, contradicts itself, matches nothing, or matches
            what the method cannot adapt. PEFT raises then, too.

    Example:
        >>> config = {"peft_type": "LORA", "target_modules": ["qkv"]}
        >>> paths = targeted_modules(config, module_kinds(model))
    """
    targets = config.get("target_modules")
    if not targets:
        raise ValueError("the config has no target_modules")
    for field in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and config.get(field) is not None:
            raise ValueError(f"{field} cannot go with target_modules that are one text")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise ValueError("layers_pattern needs layers_to_transform")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = [name for name, kind in kinds.items() if kind == "linear"]
    found = [name for name in kinds if _is_targeted(name, targets, config)]
    if not found:
        raise ValueError(f"{_described(config)} match no module of the model")
    allowed = _KINDS.get(str(config.get("peft_type")))
    for name in found:
        if allowed is not None and kinds[name] not in allowed:
            raise ValueError(
                f"{_described(config)} match {name}, which is no module that "
                f"{config['peft_type']} adapts"
            )
    return found


def _is_targeted(name: str, targets: str | list[str], config: Mapping[str, Any]) -> bool:
    if is_excluded(name, config):
        return False
    if isinstance(targets, str):
        return fullmatch(targets, name)
    # An exact name is taken whatever layers_to_transform says.
    if name in targets:
        return True
    return any(name.endswith(f".{t}") for t in targets) and _in_layers(name, config)


def is_excluded(name: str, config: Mapping[str, Any]) -> bool:
    """Whether ``exclude_modules`` or ``modules_to_save`` keep a module from being adapted."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if fullmatch(excluded, name):
            return True
    elif name in excluded or any(name.endswith(f".{e}") for e in excluded):
        return True
    saved = config.get("modules_to_save") or []
    return any(match_start(rf"(^|.*\.){m}($|\..*)", name) for m in saved)


def _in_layers(name: str, config: Mapping[str, Any]) -> bool:
    """Whether ``layers_to_transform`` takes a module that a suffix has matched."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    index = None
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        index = int(found[1]) if found else None
    for pattern in patterns:
        index = _index_behind(pattern, name)
        if index is not None:
            break
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def _index_behind(pattern: str, name: str) -> int | None:
    """The first number behind a part of the path that matches."""
    for number in re.finditer(r"\.(\d+)(?=\.)", name):
        if fullmatch(rf"(?:^|.*?\.){pattern}", name[: number.start()]):
            return int(number[1])
    return None


def _described(config: Mapping[str, Any]) -> str:
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    more = [f"{f}={_short(config[f])}" for f in fields if config.get(f)]
    return ", ".join([f"target_modules={_short(config.get('target_modules'))}", *more])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first of PEFT's patterns that matches a module.

    Args:
        patterns: ``rank_pattern`` or ``alpha_pattern``.
        module: Path of the module in PEFT's model.
        default: The value where none matches.

    Example:
        >>> pattern_value({"mlp.fc1": 8}, "blocks.3.mlp.fc1", 4)
        8
    """
    for pattern, value in (patterns or {}).items():
        if match_start(rf"(.*\.)?({pattern})$", module):
            return value
    return default
