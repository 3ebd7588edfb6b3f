"""PEFT's adapter files: names and layouts of tensors, and the fields of ``adapter_config.json``.

``adapter_model.safetensors`` holds ``base_model.model.`` + timm path + ``.lora_A.weight`` and
``.lora_B.weight`` in torch's layouts; layers that are trained in full and biases stand beside them.
Slices of a fused layer are packed into one adapter of the summed rank, whose B is zero outside the
slices' own blocks.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.methods.base import Site

PREFIX = "base_model.model."
# Initialisations that change the frozen weights, so that A and B alone do not say the model.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_scaling(config: dict[str, Any], rank: int, alpha: float) -> float:
    """PEFT's factor of an update."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def scaling_of(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor that an ``adapter_config.json`` gives the update of one module."""
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return peft_scaling(config, rank, alpha)


def alpha_for(method: str, scaling: float, rank: int) -> float:
    """The alpha with which a rank gives a scaling."""
    return scaling * (math.sqrt(rank) if method == "rslora" else rank)


def layer_to_peft(layer: Any) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Returns A and B of a LoRA layer in PEFT's layouts, with their rank and alpha."""
    factors = [
        layer.operation.factors_to_peft(layer, *(layer.unmerged_value(w) for w in update.weights))
        for update in layer.updates
    ]
    if not layer.lora_slices:
        site = layer.updates[0].site
        return *factors[0], site.rank, site.alpha
    scaling = layer.updates[0].scaling
    rank = sum(update.site.rank for update in layer.updates)
    a = np.concatenate([a for a, _ in factors])
    b = np.zeros((layer.operation.outputs(layer), rank), a.dtype)
    first = 0
    for update, (_, block) in zip(layer.updates, factors, strict=True):
        rows, columns = _block(update.site, first)
        # One scale serves the whole layer, so a slice with another one carries the ratio.
        b[rows, columns] = block * (update.scaling / scaling)
        first = columns.stop
    return a, b, rank, alpha_for(layer.lora_method, scaling, rank)


def _block(site: Site, first: int) -> tuple[slice, slice]:
    """Rows and columns of a slice in the packed B."""
    return slice(site.start, site.start + site.size), slice(first, first + site.rank)


def layer_from_peft(layer: Any, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Turns PEFT's A and B into values of a LoRA layer's variables, by variable name.

    Raises:
        ValueError: Shapes differ, or packed slices touch other outputs.
    """
    values: dict[str, np.ndarray] = {}
    if not layer.lora_slices:
        update = layer.updates[0]
        pairs = [(update, layer.operation.factors_from_peft(layer, a, b))]
    else:
        pairs, first, rest = [], 0, b.copy()
        scaling = layer.updates[0].scaling
        for update in layer.updates:
            rows, columns = _block(update.site, first)
            block = b[rows, columns] / (update.scaling / scaling)
            rest[rows, columns] = 0
            factors = layer.operation.factors_from_peft(layer, a[columns], block)
            pairs.append((update, factors))
            first = columns.stop
        if first != a.shape[0] or np.any(rest):
            raise ValueError(f"{layer.path}: the adapter is not one of the slices of this layer.")
    for update, factors in pairs:
        for variable, value in zip(update.weights, factors, strict=True):
            if tuple(value.shape) != tuple(variable.shape):
                raise ValueError(
                    f"{layer.path}: {variable.name} has shape {tuple(value.shape)} in the adapter "
                    f"and {tuple(variable.shape)} in the model."
                )
            values[variable.name] = value
    return values


def make_config(
    model_name: str, fields: Any, layers: dict[str, LoRALayer], modules: list[str]
) -> dict[str, Any]:
    """Builds the content of ``adapter_config.json``.

    Args:
        model_name: Name of the base model.
        fields: A LoRA config.
        layers: LoRA layers by timm path.
        modules: Layers that are saved in full.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    default_alpha = fields.lora_rank if fields.lora_alpha is None else fields.lora_alpha
    for module, layer in layers.items():
        _, _, rank, alpha = layer_to_peft(layer)
        # PEFT reads patterns as regular expressions from a dot on.
        if rank != fields.lora_rank:
            ranks["^" + re.escape(module)] = rank
        if alpha != default_alpha:
            alphas["^" + re.escape(module)] = alpha
    return {
        "alpha_pattern": alphas,
        "base_model_name_or_path": model_name,
        "bias": fields.lora_train_bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": default_alpha,
        "lora_bias": False,
        "lora_dropout": fields.lora_dropout,
        "modules_to_save": modules or None,
        "peft_type": "LORA",
        "r": fields.lora_rank,
        "rank_pattern": ranks,
        "target_modules": sorted(layers),
        "task_type": None,
        "use_dora": False,
        "use_rslora": fields.lora_method == "rslora",
    }


def check_config(config: dict[str, Any], source: str) -> None:
    """Raises for adapters that are no plain LoRA.

    Raises:
        ValueError: Says which feature is in the way.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{source}: peft_type is {kind!r}; only 'LORA' adapters can be read.")
    for flag in ("use_dora", "use_qalora", "lora_bias"):
        if config.get(flag):
            raise ValueError(f"{source}: {flag} is set; only plain LoRA and rsLoRA can be read.")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_REWRITING):
        raise ValueError(
            f"{source}: init_lora_weights is {initial!r}, which changed the base model's weights "
            "before training, so the adapter does not fit the original ones. Convert it in PEFT "
            "first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def fields_from_peft(
    config: dict[str, Any], tensors: dict[str, tuple[int, ...]], modules: list[str]
) -> dict[str, Any]:
    """Derives LoRA config fields from a PEFT adapter.

    Targets and ranks are those of the tensors themselves, so PEFT's rules for matching names need
    not be repeated here.

    Args:
        config: Content of ``adapter_config.json``.
        tensors: Shapes by name, without the prefix.
        modules: timm paths of layers that are stored in full.

    Returns:
        ``lora_`` fields.
    """
    suffix = ".lora_A.weight"
    ranks = {n[: -len(suffix)]: s[0] for n, s in tensors.items() if n.endswith(suffix)}
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    exact = {m: f"^{re.escape(m)}$" for m in ranks}
    alphas = {m: _pattern(config.get("alpha_pattern"), m, alpha) for m in ranks}
    return {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_method": "rslora" if config.get("use_rslora") else "lora",
        "lora_targets": tuple(exact[m] for m in sorted(ranks)),
        "lora_rank_pattern": {exact[m]: r for m, r in ranks.items() if r != rank},
        "lora_alpha_pattern": {exact[m]: a for m, a in alphas.items() if a != alpha},
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_train_bias": config.get("bias", "none"),
        "lora_modules_to_save": tuple(modules),
    }
