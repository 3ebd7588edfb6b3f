"""LoRA variant of ConvNeXt."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.architectures.convnext import ConvNeXt, ConvNeXtConfig
from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.model import LoRAModel
from tfimm_lora.lora.registry import register_lora_architecture

_MLP = ("mlp.fc1", "mlp.fc2")


@dataclasses.dataclass
class LoRAConvNeXtConfig(LoRAConfig, ConvNeXtConfig):
    """:class:`~tfimm_lora.architectures.ConvNeXtConfig` with the fields of ``LoRAConfig``.

    Example:
        >>> cfg = LoRAConvNeXtConfig(lora_rank=2)
    """


@keras_serializable
@register_lora_architecture
class LoRAConvNeXt(LoRAModel, ConvNeXt):
    """A ConvNeXt with adapted layers, by default the two layers of every MLP.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model``.

    Example:
        >>> model = lora.create_model("convnext_tiny", lora_rank=2)
    """

    cfg_class: Any = LoRAConvNeXtConfig
    lora_default_targets = _MLP
    lora_target_groups = {"mlp": _MLP}
