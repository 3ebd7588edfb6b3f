"""The zoo's frame: registry, configurations, creation, preprocessing, weight transfer."""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names

if TYPE_CHECKING:
    from tfimm_lora.architectures.config import ModelConfig
    from tfimm_lora.architectures.features import FeatureInfo
    from tfimm_lora.architectures.pretrained import PretrainedConfig
    from tfimm_lora.architectures.serialization import keras_serializable
    from tfimm_lora.models.factory import create_model
    from tfimm_lora.models.features import FeatureExtractor, create_feature_extractor
    from tfimm_lora.models.preprocessing import create_preprocessing
    from tfimm_lora.models.registry import (
        is_model,
        list_models,
        list_modules,
        model_class,
        model_config,
        pretrained_config,
        register_model,
    )
    from tfimm_lora.models.transfer import transfer_weights
    from tfimm_lora.weights.safetensors_file import save_safetensors

__all__ = [
    "FeatureExtractor",
    "FeatureInfo",
    "ModelConfig",
    "PretrainedConfig",
    "create_feature_extractor",
    "create_model",
    "create_preprocessing",
    "is_model",
    "keras_serializable",
    "list_models",
    "list_modules",
    "model_class",
    "model_config",
    "pretrained_config",
    "register_model",
    "save_safetensors",
    "transfer_weights",
]

_REGISTRY = "tfimm_lora.models.registry"
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FeatureExtractor": "tfimm_lora.models.features",
        "FeatureInfo": "tfimm_lora.architectures.features",
        "ModelConfig": "tfimm_lora.architectures.config",
        "PretrainedConfig": "tfimm_lora.architectures.pretrained",
        "create_feature_extractor": "tfimm_lora.models.features",
        "create_model": "tfimm_lora.models.factory",
        "create_preprocessing": "tfimm_lora.models.preprocessing",
        "is_model": _REGISTRY,
        "keras_serializable": "tfimm_lora.architectures.serialization",
        "list_models": _REGISTRY,
        "list_modules": _REGISTRY,
        "model_class": _REGISTRY,
        "model_config": _REGISTRY,
        "pretrained_config": _REGISTRY,
        "register_model": _REGISTRY,
        "save_safetensors": "tfimm_lora.weights.safetensors_file",
        "transfer_weights": "tfimm_lora.models.transfer",
    },
    globals(),
)
