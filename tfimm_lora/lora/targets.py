"""Which layers of a model are adapted: from patterns on timm paths to layers and ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.lora.layers import is_adaptable
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import iterate_layers, timm_path
from tfimm_lora.weights.patterns import matches, pattern_value

GROUPS = ("attention", "mlp", "all")


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer to adapt.

    Attributes:
        module: timm path of the layer.
        path: Its path in Keras' spelling.
        layer: The layer.
        arguments: ``lora_`` arguments for :func:`~tfimm_lora.lora.convert_to_lora_layer`.
    """

    module: str
    path: str
    layer: keras.layers.Layer
    arguments: dict[str, Any]


def _as_patterns(targets: str | Sequence[str]) -> list[str]:
    return targets.split() if isinstance(targets, str) else list(targets)


class _Candidates:
    """What can be adapted in a model: layers, and named slices of their outputs."""

    def __init__(
        self, model: keras.Model, classifier: Sequence[str], slices: Mapping[str, Sequence[str]]
    ):
        self.layers: dict[str, tuple[str, keras.layers.Layer]] = {}
        self.other: dict[str, str] = {}
        self.slices: dict[str, tuple[str, int, int]] = {}
        for path, layer in iterate_layers(model):
            module = timm_path(path)
            if not is_adaptable(layer):
                self.other[module] = type(layer).__name__
                continue
            self.layers[module] = (path, layer)
            for suffix, names in slices.items():
                if module == suffix or module.endswith("." + suffix):
                    parent = module[: -len(suffix)] + suffix.rpartition(".")[0]
                    for i, name in enumerate(names):
                        self.slices[f"{parent}.{name}"] = (module, i, len(names))
        self.classifier = classifier

    def find(self, pattern: str, groups: Mapping[str, Sequence[str]]) -> tuple[set[str], set[str]]:
        """Layers and slices that a pattern names.

        Raises:
            ValueError: There are none.
        """
        if pattern == "all":
            below = {m for m in self.layers if is_below(m + ".", self.classifier)}
            return set(self.layers) - below, set()
        if pattern in GROUPS:
            if pattern not in groups:
                raise ValueError(
                    f"lora_targets={pattern!r}: this architecture has no such group. Groups: "
                    f"{', '.join([*groups, 'all'])}."
                )
            return {m for p in groups[pattern] for m in self.layers if matches(p, m)}, set()
        layers = {m for m in self.layers if matches(pattern, m)}
        # A wildcard that takes a whole projection does not mean its slices as well.
        slices = {
            s
            for s, (module, *_) in self.slices.items()
            if module not in layers and matches(pattern, s)
        }
        if not layers and not slices:
            raise ValueError(self._explain(pattern))
        return layers, slices

    def _explain(self, pattern: str) -> str:
        known = [*self.layers, *self.slices]
        other = [m for m in self.other if matches(pattern, m)]
        if other:
            inside = f" Use {pattern + '.*'!r} for what is inside." if self.below(other) else ""
            return (
                f"lora_targets: {pattern!r} matches {other[0]!r}, a {self.other[other[0]]}, which "
                f"cannot be adapted.{inside}"
            )
        ends = {re.sub(r"^(.*\.)?\d+\.", "", m) for m in known}
        return (
            f"lora_targets: {pattern!r} matches no layer.{nearest_names(pattern, {*ends, *known})} "
            f"Layers that can be adapted end in: {', '.join(sorted(ends)) or 'none'}."
        )

    def below(self, modules: Sequence[str]) -> bool:
        """Whether any layer lies below any of the modules."""
        return any(is_below(m, other) for other in modules for m in self.layers)


def find_targets(
    model: keras.Model,
    cfg: Any,
    default: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    slices: Mapping[str, Sequence[str]],
    classifier: Sequence[str],
) -> list[Target]:
    """Resolves the fields of a LoRA config to layers.

    Args:
        model: The model; its layers may be unbuilt.
        cfg: Has the fields of :class:`~tfimm_lora.lora.LoRAConfig`.
        default: Patterns to use where ``cfg.lora_targets`` is ``None``.
        groups: Patterns of the groups ``attention`` and ``mlp``.
        slices: Names of the equal slices of a layer's outputs, by the end of the layer's path.
        classifier: timm paths of the classification layers.

    Returns:
        The layers to adapt, in the model's order.

    Raises:
        ValueError: A pattern matches nothing, or a layer is targeted as a whole and in slices.
    """
    candidates = _Candidates(model, classifier, slices)
    patterns = _as_patterns(default if cfg.lora_targets is None else cfg.lora_targets)
    if not patterns:
        raise ValueError("lora_targets is empty: nothing would be adapted.")
    layers: set[str] = set()
    parts: dict[str, dict[str, Any]] = {}
    for pattern in patterns:
        found, found_slices = candidates.find(pattern, groups)
        layers |= found
        for name in sorted(found_slices, key=lambda s: candidates.slices[s][1]):
            module, index, count = candidates.slices[name]
            facts: dict[str, Any] = {"index": index, "of": count}
            facts["rank"] = pattern_value(cfg.lora_rank_pattern, name, cfg.lora_rank)
            alpha = pattern_value(cfg.lora_alpha_pattern, name, cfg.lora_alpha)
            facts["alpha"] = facts["rank"] if alpha is None else alpha
            parts.setdefault(module, {})[name.rpartition(".")[2]] = facts
    if not layers and not parts:
        raise ValueError(f"lora_targets={patterns}: the model has no layer that can be adapted.")
    both = sorted(layers & set(parts))
    if both:
        raise ValueError(
            f"lora_targets: {both[0]!r} is targeted as a whole and in slices "
            f"({', '.join(parts[both[0]])}). Use one of the two."
        )
    _check_patterns(cfg, [*layers, *(s for s in candidates.slices if _is_part(s, parts))])
    method = METHODS[cfg.lora_method]
    chosen = [m for m in candidates.layers if m in layers or m in parts]
    options = method.options_by_layer(cfg.lora_options, chosen)
    targets = []
    for module, (path, layer) in candidates.layers.items():
        if module in options:
            alpha = pattern_value(cfg.lora_alpha_pattern, module, cfg.lora_alpha)
            arguments = {
                "lora_rank": pattern_value(cfg.lora_rank_pattern, module, cfg.lora_rank),
                "lora_alpha": alpha,
                "lora_method": cfg.lora_method,
                "lora_dropout": cfg.lora_dropout,
                "lora_init": cfg.lora_init,
                "lora_options": options[module],
                "lora_train_bias": cfg.lora_train_bias,
                "lora_slices": parts.get(module),
            }
            targets.append(Target(module, path, layer, arguments))
    return targets


def _is_part(name: str, parts: Mapping[str, Mapping[str, Any]]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return any(m.rpartition(".")[0] == parent and leaf in found for m, found in parts.items())


def _check_patterns(cfg: Any, modules: Sequence[str]) -> None:
    for field in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(cfg, field):
            if not any(matches(pattern, m) for m in modules):
                raise ValueError(
                    f"{field}: {pattern!r} matches none of the adapted layers."
                    f"{nearest_names(pattern, modules)}"
                )
