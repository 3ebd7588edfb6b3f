"""Building blocks of the architectures, one idea a file."""

from tfimm_lora.layers.activation import get_activation
from tfimm_lora.layers.attention import Attention
from tfimm_lora.layers.drop import Dropout, DropPath
from tfimm_lora.layers.layer_scale import LayerScale
from tfimm_lora.layers.mlp import Mlp
from tfimm_lora.layers.norm import GlobalResponseNorm, RMSNorm, SimpleNorm, create_norm
from tfimm_lora.layers.patch_embed import PatchEmbed

__all__ = [
    "Attention",
    "DropPath",
    "Dropout",
    "GlobalResponseNorm",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "SimpleNorm",
    "create_norm",
    "get_activation",
]
