"""Forward passes of the zoo's architectures; their variants are data in ``variants/``."""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names
from tfimm_lora.architectures.config import ModelConfig
from tfimm_lora.architectures.pretrained import PretrainedConfig

if TYPE_CHECKING:
    from tfimm_lora.architectures.convnext import ConvNeXt, ConvNeXtConfig
    from tfimm_lora.architectures.serialization import keras_serializable
    from tfimm_lora.architectures.vit import ViT
    from tfimm_lora.architectures.vit_config import ViTConfig

__all__ = [
    "ConvNeXt",
    "ConvNeXtConfig",
    "ModelConfig",
    "PretrainedConfig",
    "ViT",
    "ViTConfig",
    "keras_serializable",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConvNeXt": "tfimm_lora.architectures.convnext",
        "ConvNeXtConfig": "tfimm_lora.architectures.convnext",
        "ViT": "tfimm_lora.architectures.vit",
        "ViTConfig": "tfimm_lora.architectures.vit_config",
        "keras_serializable": "tfimm_lora.architectures.serialization",
    },
    globals(),
)
