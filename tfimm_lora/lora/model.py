"""What turns an architecture into its LoRA variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.insertion import insert_adapter
from tfimm_lora.lora.keeps_adapters import KeepsAdapters
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.layers import convert_to_lora_layer, is_adaptable
from tfimm_lora.lora.quantizing import assign_formats
from tfimm_lora.lora.trainable import fully_trained_layers
from tfimm_lora.models.replace import replace_layers
from tfimm_lora.quantization.planning import check_formats


class LoRAModel(KeepsAdapters):
    """Mixin in front of an architecture: ``class LoRAViT(LoRAModel, ViT)``.

    The architecture's constructor creates its layers, unbuilt; those that the config targets are
    then given an adapter, before anything is built. At the end of ``build`` the ``trainable`` flags
    of all weights are set from the config. Every layer that can be adapted is a LoRA layer, with an
    adapter or without, so that adapters can be added later.

    Attributes:
        lora_default_targets: Patterns used where the config has none; a property where they depend
            on ``self.cfg``.
        lora_target_groups: Patterns of the groups ``attention`` and ``mlp``; likewise.
        lora_slices: Names of equal slices of a layer's outputs, by the end of its timm path.

    Example:
        >>> @keras_serializable
        ... @register_lora_architecture
        ... class LoRAViT(LoRAModel, ViT):
        ...     cfg_class = LoRAViTConfig
    """

    lora_default_targets: Any = ("all",)
    lora_target_groups: Any = {}
    lora_slices: ClassVar[Mapping[str, Sequence[str]]] = {}

    cfg: Any
    pretrained_cfg: Any

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        further = kwargs.pop("lora_adapters", None) or {}
        active = kwargs.pop("lora_active", None)
        super().__init__(cfg, **kwargs)  # type: ignore[call-arg]
        make_adaptable(self)
        self._adapter_state = AdapterState({cfg.lora_adapter_name: cfg})
        insert_adapter(self, cfg.lora_adapter_name, cfg)
        self._add_further(further, active)

    def build(self, input_shape: Any) -> None:
        """Builds the architecture, then sets which weights are trained."""
        wanted = getattr(self.cfg, "lora_quantization", None)
        if wanted is not None:
            planned = assign_formats(
                self, wanted, self.cfg.lora_group_size, self.cfg.lora_quantize_merged
            )
        super().build(input_shape)  # type: ignore[misc]
        if wanted is not None:
            check_formats(self, planned, "lora_group_size")
        self._adapter_state.settle(self)

    @property
    def lora_trainable_layers(self) -> list[str]:
        """Paths of layers that are trained in full: perhaps the classifier, and chosen ones."""
        return fully_trained_layers(self)


def make_adaptable(model: Any) -> None:
    """Replaces every layer of an unbuilt model that has a LoRA version by it, without adapters.

    Args:
        model: A model that is not built.
    """

    def convert(layer: Any) -> Any:
        if not is_adaptable(layer) or isinstance(layer, LoRALayer):
            return None
        return convert_to_lora_layer(layer, lora_method=None)

    replace_layers(model, convert)
