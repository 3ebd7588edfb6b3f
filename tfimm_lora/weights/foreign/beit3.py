"""BEiT-3 as Microsoft publishes it: ``beit3.``; branch A of its layers sees images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Shape, Translation, fuse_qkv, renamed

_RULES = [
    (r"^beit3\.vision_embed\.cls_token$", "cls_token"),
    (r"^beit3\.vision_embed\.", "patch_embed."),
    (r"^beit3\.encoder\.embed_positions\.A\.weight$", "pos_embed"),
    (r"^beit3\.encoder\.", ""),
    (r"\.A\.", "."),
    (r"^layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.ffn\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.", ".mlp."),
]
_UNUSED = ("beit3.text_embed.weight", "beit3.vision_embed.mask_token")


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    return any(name.startswith("beit3.") for name in shapes)


def _translate(to: Translation, cfg: Any) -> None:
    used = [n for n in to.shapes if ".B." not in n and n not in _UNUSED]
    names = fuse_qkv(to, renamed(used, _RULES))
    positions = names.pop("pos_embed", None)
    to.keep_all(names)
    if positions is not None:
        # The first two rows are for padding, as fairseq counts positions.
        rows, width = to.shapes[positions]
        to.make("pos_embed", [positions], (1, rows - 2, width), lambda table: table[None, 2:])


BEIT3 = Format("BEiT-3 of Microsoft", _recognise, _translate)
