"""ViT, DeiT, I-JEPA and ViT-MAE as the library transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Shape, Translation, fuse_qkv, renamed

# In a model with a head the encoder has a name; one that was saved alone has none.
_ENCODER = r"^(?:vit|deit|ijepa)\."
ENCODER_RULES = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.query\.", ".attn.q."),
    (r"\.attention\.attention\.key\.", ".attn.k."),
    (r"\.attention\.attention\.value\.", ".attn.v."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"^layernorm\.", "norm."),
]
"""What ViT and its relatives have in common in transformers."""

RULES = [
    (_ENCODER, ""),
    *ENCODER_RULES,
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
"""Patterns of names there and what they are here; adapters are translated by them too."""
# A layer behind the class token that timm does not have, and what masked training needs.
_UNUSED = ("pooler.", "vit.pooler.", "deit.pooler.", "ijepa.pooler.", "decoder.")


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    names = renamed(shapes, [(_ENCODER, "")])
    return {
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layernorm_before.weight",
        "encoder.layer.0.attention.attention.query.weight",
    } <= set(names)


def _translate(to: Translation, cfg: Any) -> None:
    used = [
        n
        for n in to.shapes
        if not n.startswith(_UNUSED) and not n.endswith("embeddings.mask_token")
    ]
    to.keep_all(fuse_qkv(to, renamed(used, RULES)))


HF_VIT = Format("ViT, DeiT, I-JEPA or ViT-MAE of transformers", _recognise, _translate)
