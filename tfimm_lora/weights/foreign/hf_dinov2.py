"""DINOv2, with and without registers, as the library transformers saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.dinov2 import add_registers
from tfimm_lora.weights.foreign.hf_vit import ENCODER_RULES
from tfimm_lora.weights.foreign.view import Format, Shape, Translation, fuse_qkv, renamed

# In a model with a head the encoder has a name; one that was saved alone has none.
_ENCODER = r"^dinov2(?:_with_registers)?\."
RULES = [
    (_ENCODER, ""),
    *ENCODER_RULES,
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^classifier\.", "head."),
]
"""Patterns of names there and what they are here; adapters are translated by them too."""


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    names = renamed(shapes, [(_ENCODER, "")])
    return {
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layer_scale1.lambda1",
    } <= set(names)


def _translate(to: Translation, cfg: Any) -> None:
    names = fuse_qkv(to, renamed(to.shapes, RULES))
    names.pop("mask_token", None)  # of training
    if "reg_token" in names and {"cls_token", "pos_embed"} <= set(names):
        add_registers(to, names.pop("reg_token"), names.pop("cls_token"), names.pop("pos_embed"))
    to.keep_all(names)


HF_DINOV2 = Format("DINOv2 of transformers", _recognise, _translate)
