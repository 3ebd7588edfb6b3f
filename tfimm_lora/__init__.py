"""timm's ConvNeXt and ViT models for Keras 3, and low-rank adaptation of every one of them.

Example:
    >>> from tfimm_lora import lora
    >>> model = lora.create_model("convnext_tiny", pretrained=True, lora_rank=2)
"""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names
from tfimm_lora._registration import register_classes
from tfimm_lora.version import __version__

if TYPE_CHECKING:
    from tfimm_lora import architectures, layers, lora, models, quantization, weights
    from tfimm_lora.architectures.config import ModelConfig
    from tfimm_lora.architectures.pretrained import PretrainedConfig
    from tfimm_lora.data.factory import create_transform
    from tfimm_lora.models.factory import create_model
    from tfimm_lora.models.features import create_feature_extractor
    from tfimm_lora.models.preprocessing import create_preprocessing
    from tfimm_lora.models.registry import list_models, register_model

__all__ = [
    "ModelConfig",
    "PretrainedConfig",
    "__version__",
    "architectures",
    "create_feature_extractor",
    "create_model",
    "create_preprocessing",
    "create_transform",
    "layers",
    "list_models",
    "lora",
    "models",
    "quantization",
    "register_model",
    "weights",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ModelConfig": "tfimm_lora.architectures.config",
        "PretrainedConfig": "tfimm_lora.architectures.pretrained",
        "architectures": "tfimm_lora.architectures",
        "create_feature_extractor": "tfimm_lora.models.features",
        "create_model": "tfimm_lora.models.factory",
        "create_preprocessing": "tfimm_lora.models.preprocessing",
        "create_transform": "tfimm_lora.data.factory",
        "layers": "tfimm_lora.layers",
        "list_models": "tfimm_lora.models.registry",
        "lora": "tfimm_lora.lora",
        "models": "tfimm_lora.models",
        "quantization": "tfimm_lora.quantization",
        "register_model": "tfimm_lora.models.registry",
        "weights": "tfimm_lora.weights",
    },
    globals(),
)

register_classes()
