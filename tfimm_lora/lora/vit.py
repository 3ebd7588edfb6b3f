"""LoRA variant of ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.architectures.vit import ViT, ViTConfig
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.model import LoRAModel
from tfimm_lora.lora.registry import register_lora_architecture

_ATTENTION = ("attn.qkv", "attn.proj")
_MLP = ("mlp.fc1", "mlp.fc2")


@dataclasses.dataclass
class LoRAViTConfig(LoRAConfig, ViTConfig):
    """:class:`~tfimm_lora.architectures.ViTConfig` with the fields of ``LoRAConfig``.

    Example:
        >>> cfg = LoRAViTConfig(lora_rank=8, lora_targets=("attn.q", "attn.v"))
    """


@keras_serializable
@register_lora_architecture
class LoRAViT(LoRAModel, ViT):
    """A ViT with adapted layers, by default all linear layers of its blocks.

    ``attn.q``, ``attn.k`` and ``attn.v`` name the three slices of the fused ``attn.qkv``.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model``.

    Example:
        >>> model = lora.create_model("vit_tiny_patch16_224", lora_targets=["attn.q", "attn.v"])
    """

    cfg_class: Any = LoRAViTConfig
    lora_default_targets = (*_ATTENTION, *_MLP)
    lora_target_groups = {"attention": _ATTENTION, "mlp": _MLP}
    lora_slices = {"attn.qkv": ("q", "k", "v")}
