"""LoRA variant of ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.architectures.vit import ViT
from tfimm_lora.architectures.vit_config import ViTConfig
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.model import LoRAModel
from tfimm_lora.lora.registry import register_lora_architecture

# Layers of the blocks, by timm's name of the block. A block of its own kind fuses both.
_PARALLEL = {
    "ParallelScalingBlock": ("in_proj", "attn_out_proj", "mlp_out_proj"),
    "DiffParallelScalingBlock": ("in_proj", "out_proj"),
}
_GATED = {"swiglu": ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")}


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

    ``attn.q``, ``attn.k`` and ``attn.v`` name the three slices of the fused ``attn.qkv``. The
    layers of attention pooling (``attn_pool.q``, ``.kv``, ``.proj``, ``.mlp.fc1``, ``.mlp.fc2``)
    belong to no block and are adapted only where they are named.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model``.

    Example:
        >>> model = lora.create_model("vit_tiny_patch16_224", lora_targets=["attn.q", "attn.v"])
    """

    cfg_class: Any = LoRAViTConfig
    lora_slices = {"attn.qkv": ("q", "k", "v")}

    @property
    def lora_default_targets(self) -> tuple[str, ...]:
        """All linear layers of the blocks, by patterns that fit the kind of block."""
        fused = _PARALLEL.get(self.cfg.block_fn)
        if fused is None:
            groups = self.lora_target_groups
            return (*groups["attention"], *groups["mlp"])
        return tuple(f"blocks.*.{name}" for name in fused)

    @property
    def lora_target_groups(self) -> dict[str, tuple[str, ...]]:
        """Patterns of ``attention`` and ``mlp``; a parallel block that fuses them has neither."""
        if self.cfg.block_fn in _PARALLEL:
            return {}
        mlp = _GATED.get(self.cfg.mlp_layer, ("mlp.fc1", "mlp.fc2"))
        return {
            "attention": ("blocks.*.attn.qkv", "blocks.*.attn.proj"),
            "mlp": tuple(f"blocks.*.{name}" for name in mlp),
        }
