"""Which model an adapter belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import base_config_values
from tfimm_lora.lora.adapter_state import AdapterState, adapter_state
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.trainable import kept_variables
from tfimm_lora.weights.names import is_lora_weight, named_variables


def model_name(model: Any) -> str:
    """The name of a model in timm, with the tag of its checkpoint."""
    facts = getattr(model, "pretrained_cfg", None)
    name = getattr(getattr(model, "cfg", None), "name", "") or model.name
    return f"{name}.{facts.tag}" if facts is not None and facts.tag else name


def adapter_fields(state: AdapterState, name: str) -> LoRAConfig:
    """The config of an adapter; a variant of a user's own may have only some of the fields."""
    cfg = state.fields[name]
    if isinstance(cfg, LoRAConfig):
        return cfg
    return LoRAConfig(**split_lora_values(base_config_values(cfg, LoRAConfig))[0])


def base_hash(model: Any, name: str) -> str:
    """SHA-256 of all weights of the base model that an adapter does not store.

    Args:
        model: A LoRA model.
        name: Name of the adapter.
    """
    state = adapter_state(model)
    stored = {v.path for v in kept_variables(model, name, adapter_fields(state, name))}
    digest = hashlib.sha256()
    for v in sorted(named_variables(model), key=lambda v: v.path):
        if v.path in stored or is_lora_weight(v.leaf):
            continue
        digest.update(v.name.encode())
        value = state.value_of("", v)
        digest.update(np.ascontiguousarray(value, dtype=np.float32).tobytes())
    return digest.hexdigest()
