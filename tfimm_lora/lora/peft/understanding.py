"""From what PEFT wrote to our fields and names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.peft.adapter_file import AdapterFile
from tfimm_lora.lora.peft.config import initial_fields, method_of
from tfimm_lora.lora.peft.targets import (
    is_excluded,
    module_kinds,
    pattern_value,
    targeted_modules,
)
from tfimm_lora.lora.peft.tensors import slice_path
from tfimm_lora.lora.peft.transformers_names import modules_there, timm_names
from tfimm_lora.weights.names import iterate_layers, timm_path
from tfimm_lora.weights.regex import fullmatch


def understand(adapter: AdapterFile, source: str, model: Any) -> None:
    """Derives the fields from what PEFT wrote, and gives tensors timm's names."""
    config = adapter.config
    method_name = method_of(config, source)
    method = METHODS[method_name]
    shared = {k: v for k, v in adapter.tensors.items() if k in method.peft_shared}
    tensors = {k: v for k, v in adapter.tensors.items() if k not in shared}
    kinds = {} if model is None else module_kinds(model)
    translated = timm_names(tensors, kinds)
    if translated is None:
        there = {module: module for module in kinds}
        names = {key: key for key in tensors}
    else:
        names = translated
        there = modules_there(tensors, _with_slices(model, kinds))
        for key, new in names.items():
            there.setdefault(_module(key, method), _module(new, method))
    known = _with_slices(model, kinds) if model is not None else {}
    adapted = {_module(k, method) for k in tensors if _end(k, method)}
    saved = _modules_to_save(config, [k for k in tensors if not _end(k, method)])
    if model is not None and config.get("target_modules"):
        here = {old: known[new] for old, new in there.items() if new in known}
        _check_targets(config, adapted, here, adapter.source)
    adapter.tensors = {names[k]: v for k, v in tensors.items()} | shared

    def timm(module: str) -> str:
        return there.get(module, module)

    fields = {**method.fields_from_peft(_feedforward_here(config, adapted, timm))}
    fields |= initial_fields(config, method, source)
    if model is not None:
        layers = {timm_path(path): layer for path, layer in iterate_layers(model)}
        fields = method.refine_fields(fields, adapter.tensors, layers)
    fields["lora_method"] = method_name
    rank, alpha = fields.get("lora_rank"), fields.get("lora_alpha")
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    targets = []
    for module in sorted(adapted, key=timm):
        exact = f"^{re.escape(timm(module))}$"
        targets.append(exact)
        if rank is not None:
            ranks[exact] = _first(
                method.peft_rank(config, module), config, "rank_pattern", module, rank
            )
            alphas[exact] = _first(
                method.peft_alpha(config, module), config, "alpha_pattern", module, alpha
            )
    adapter.fields = {
        **fields,
        "lora_targets": tuple(targets),
        "lora_rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "lora_alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "lora_train_bias": re.sub(r"^(vera|b?oft)_only$", "lora_only", config.get("bias", "none")),
        "lora_train_classifier": False,
        "lora_modules_to_save": tuple(dict.fromkeys(timm(m) for m in saved)),
    }
    if not targets:
        raise ValueError(
            f"{adapter.source} has no tensors of {config['peft_type']} (their names end in "
            f"{', '.join(method.peft_tensors)})."
        )


def _first(own: Any, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    if own is not None:
        return own
    patterns = config.get(field) if config.get("peft_type") != "ADALORA" else None
    return pattern_value(patterns, module, default)


def _end(key: str, method: Any) -> str:
    return next((e for e in method.peft_tensors if key.endswith(f".{e}")), "")


def _module(key: str, method: Any) -> str:
    end = _end(key, method)
    if end:
        return key[: -len(end) - 1]
    return key.rpartition(".")[0].removesuffix(".base_layer")


def _with_slices(model: Any, kinds: Mapping[str, str]) -> dict[str, str]:
    """Kinds with the slices of fused layers, which transformers has as modules of their own."""
    found = dict(kinds)
    for suffix, names in _slices(model).items():
        for module in kinds:
            if module == suffix or module.endswith(f".{suffix}"):
                found |= {slice_path(module, n): kinds[module] for n in names}
    return found


def _slices(model: Any) -> Mapping[str, Any]:
    if hasattr(model, "lora_slices") or model is None:
        return getattr(model, "lora_slices", {})
    from tfimm_lora.lora.registry import lora_architecture

    try:
        return getattr(lora_architecture(type(model)), "lora_slices", {})
    except ValueError:
        return {}


def _check_targets(
    config: Mapping[str, Any], adapted: set[str], kinds: Mapping[str, str], source: str
) -> None:
    """Raises unless the file has tensors for exactly the modules that the config targets.

    Raises:
        ValueError: Names the modules that lack tensors and those that nobody targets.
    """
    try:
        targeted = set(targeted_modules(config, kinds))
    except ValueError as error:
        unknown = sorted(adapted - set(kinds))
        if unknown:
            raise ValueError(_unknown_modules(unknown, kinds, source)) from error
        raise ValueError(f"{source}: {error}.") from error
    unknown = sorted(adapted - set(kinds))
    missing, surplus = sorted(targeted - adapted), sorted(adapted - targeted - set(unknown))
    if unknown:
        raise ValueError(_unknown_modules(unknown, kinds, source))
    if missing or surplus:
        reasons = []
        if missing:
            reasons.append(
                f"target_modules also mean {_some(missing)}, which the file has no tensors for (of "
                f"{len(targeted)} modules it has {len(targeted & adapted)})"
            )
        if surplus:
            shield = " (modules_to_save or exclude_modules excludes it)" if any(
                is_excluded(m, config) for m in surplus
            ) else ""  # fmt: skip
            reasons.append(f"it has tensors for {_some(surplus)}, which is not targeted{shield}")
        raise ValueError(
            f"{source}: config and tensors do not fit together or this model: "
            f"{'; '.join(reasons)}. PEFT would answer with a part of the adapter only."
        )


def _unknown_modules(unknown: list[str], kinds: Mapping[str, str], source: str) -> str:
    message = (
        f"{source}: the adapter is for another architecture: the model has no {_some(unknown)}"
    )
    for name in unknown:
        found = re.match(r"(.*?)\.(\d+)\.", name)
        if found is None:
            continue
        pattern = re.compile(rf"{re.escape(found[1])}\.(\d+)(\.|$)")
        numbers = [int(m[1]) for k in kinds if (m := pattern.match(k))]
        if numbers:
            return (
                f"{message} (its {found[1]} end at {max(numbers)}: the adapter's model is deeper)."
            )
    inner = [m for m, kind in kinds.items() if kind in ("linear", "conv")]
    return f"{message}. Its layers are called {_some(inner)}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _feedforward_here(config: Mapping[str, Any], adapted: set[str], timm: Any) -> dict[str, Any]:
    """The config with ``feedforward_modules`` in timm's names, by PEFT's rule for them."""
    found = config.get("feedforward_modules")
    if not found:
        return dict(config)
    inner = [
        m
        for m in sorted(adapted)
        if (fullmatch(found, m) if isinstance(found, str) else any(m.endswith(f) for f in found))
    ]
    return {**config, "feedforward_modules": "|".join(re.escape(timm(m)) for m in inner)}


def _modules_to_save(config: Mapping[str, Any], keys: list[str]) -> list[str]:
    """Paths of the layers that PEFT stored in full."""
    found = []
    for item in config.get("modules_to_save") or []:
        for key in keys:
            match = re.match(rf"((^|.*\.){re.escape(item)})\.", key)
            if match and match[1] not in found:
                found.append(match[1])
    return found
