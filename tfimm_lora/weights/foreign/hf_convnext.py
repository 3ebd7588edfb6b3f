"""ConvNeXt and ConvNeXt V2 as the library transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.convnext import add_convnext
from tfimm_lora.weights.foreign.view import Format, Shape, Translation, renamed

# In a model with a head the encoder has a name; one that was saved alone has none.
_ENCODER = r"^convnext(?:v2)?\."
RULES = [
    (_ENCODER, ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
]
"""Patterns of names there and what they are here; adapters are translated by them too."""


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    names = renamed(shapes, [(_ENCODER, "")])
    return {
        "embeddings.patch_embeddings.weight",
        "encoder.stages.0.layers.0.dwconv.weight",
    } <= set(names)


def _translate(to: Translation, cfg: Any) -> None:
    add_convnext(to, renamed(to.shapes, RULES), cfg)


HF_CONVNEXT = Format("ConvNeXt of transformers", _recognise, _translate)
