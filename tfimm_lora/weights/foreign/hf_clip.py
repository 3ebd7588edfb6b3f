"""The vision towers of CLIP and SigLIP as the library transformers saves them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Shape, Translation, fuse_qkv, renamed

# A tower that was saved alone may have no name.
_TOWER = r"^vision_model\."
RULES = [
    (_TOWER, ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # spelled so
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.probe$", "attn_pool.latent"),
]
"""Patterns of names there and what they are here; adapters are translated by them too."""
# The other tower, its temperature, and indices that are counted anew.
_UNUSED = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_PATCHES = "embeddings.patch_embedding.weight"
_CLASS = "embeddings.class_embedding"


def _names(to: Translation) -> dict[str, str]:
    used = [n for n in to.shapes if not n.startswith(_UNUSED) and not n.endswith(".position_ids")]
    names = fuse_qkv(to, renamed(used, RULES))
    positions = names.pop("pos_embed", None)
    if positions is not None:
        to.reshape("pos_embed", positions, (1, *to.shapes[positions]))
    return names


def _translate_clip(to: Translation, cfg: Any) -> None:
    names = _names(to)
    token = names.pop("cls_token")
    to.reshape("cls_token", token, (1, 1, *to.shapes[token]))
    # The projection into the space shared with texts is the classifier, without bias.
    projection = names.pop("visual_projection.weight", None)
    if projection is not None:
        to.keep("head.weight", projection)
        to.fill("head.bias", to.shapes[projection][:1], 0.0)
    to.keep_all(names)


def _translate_siglip(to: Translation, cfg: Any) -> None:
    names = _names(to)
    if cfg.global_pool != "map":  # without attention pooling its weights are left out, as in timm
        names = {n: s for n, s in names.items() if not n.startswith("attn_pool.")}
        # SiglipForImageClassification averages the tokens, as these models do.
        names = {re.sub(r"^classifier\.", "head.", n): s for n, s in names.items()}
    for leaf in ("weight", "bias"):
        source = names.pop(f"attn_pool.in_proj.{leaf}", None)
        if source is not None:
            width = to.shapes[source][0] // 3
            to.slice(f"attn_pool.q.{leaf}", source, 0, 0, width)
            to.slice(f"attn_pool.kv.{leaf}", source, 0, width)
    to.keep_all(names)


def _is_clip(shapes: Mapping[str, Shape]) -> bool:
    return {_PATCHES, _CLASS} <= set(renamed(shapes, [(_TOWER, "")]))


def _is_siglip(shapes: Mapping[str, Shape]) -> bool:
    names = renamed(shapes, [(_TOWER, "")])
    return _PATCHES in names and _CLASS not in names


HF_CLIP = Format("CLIP of transformers", _is_clip, _translate_clip)
HF_SIGLIP = Format("SigLIP of transformers", _is_siglip, _translate_siglip)
