"""Building blocks of the architectures, one idea a file."""

from tfimm_lora.layers.activation import get_activation
from tfimm_lora.layers.attention import Attention
from tfimm_lora.layers.attention_pool import AttentionPoolLatent
from tfimm_lora.layers.diff_attention import DiffAttention
from tfimm_lora.layers.drop import Dropout, DropPath, create_drop_path, create_dropout
from tfimm_lora.layers.layer_scale import LayerScale
from tfimm_lora.layers.mlp import Mlp
from tfimm_lora.layers.norm import GlobalResponseNorm, RMSNorm, SimpleNorm, create_norm
from tfimm_lora.layers.patch_embed import PatchEmbed
from tfimm_lora.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "DiffAttention",
    "DropPath",
    "Dropout",
    "GlobalResponseNorm",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "SimpleNorm",
    "SwiGLU",
    "create_drop_path",
    "create_dropout",
    "create_norm",
    "get_activation",
]
