"""Low-rank adaptation of the zoo's models and of functional and Sequential ones."""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names

if TYPE_CHECKING:
    from tfimm_lora.lora.adapters import load_adapter, save_adapter
    from tfimm_lora.lora.combine import combine_adapters
    from tfimm_lora.lora.config import LoRAConfig
    from tfimm_lora.lora.convnext import LoRAConvNeXt, LoRAConvNeXtConfig
    from tfimm_lora.lora.eva import initialize_eva
    from tfimm_lora.lora.factory import convert_to_lora_model, create_model
    from tfimm_lora.lora.functional import LoRAFunctional
    from tfimm_lora.lora.hub import push_adapter_to_hub
    from tfimm_lora.lora.layer import LoRALayer
    from tfimm_lora.lora.layers import (
        LoRAConv2D,
        LoRADense,
        LoRADepthwiseConv2D,
        LoRAEinsumDense,
        convert_to_lora_layer,
    )
    from tfimm_lora.lora.merge import lora_layers, merge_lora_weights, unmerge_lora_weights
    from tfimm_lora.lora.merge_drift import MergeDrift
    from tfimm_lora.lora.model import LoRAModel
    from tfimm_lora.lora.optimizer_hooks import prepare_optimizer
    from tfimm_lora.lora.per_example import adapter_ids
    from tfimm_lora.lora.quantizing import quantize
    from tfimm_lora.lora.registry import (
        lora_architecture,
        lora_base_architecture,
        lora_config,
        register_lora_architecture,
    )
    from tfimm_lora.lora.regular import convert_to_regular_model
    from tfimm_lora.lora.several import (
        active_adapters,
        adapter_names,
        add_adapter,
        delete_adapter,
        disable_adapters,
        set_adapter,
    )
    from tfimm_lora.lora.swap import swap_adapter
    from tfimm_lora.lora.trainable import (
        lora_non_trainable_weights,
        lora_trainable_weights,
        print_trainable_parameters,
        set_trainable,
    )
    from tfimm_lora.lora.training_hooks import rank_history
    from tfimm_lora.lora.vit import LoRAViT, LoRAViTConfig
    from tfimm_lora.weights.names import LORA_WEIGHT_NAMES

_NAMES = {
    "tfimm_lora.lora.adapters": ("load_adapter", "save_adapter"),
    "tfimm_lora.lora.combine": ("combine_adapters",),
    "tfimm_lora.lora.config": ("LoRAConfig",),
    "tfimm_lora.lora.convnext": ("LoRAConvNeXt", "LoRAConvNeXtConfig"),
    "tfimm_lora.lora.eva": ("initialize_eva",),
    "tfimm_lora.lora.factory": (
        "convert_to_lora_model",
        "create_model",
    ),
    "tfimm_lora.lora.functional": ("LoRAFunctional",),
    "tfimm_lora.lora.hub": ("push_adapter_to_hub",),
    "tfimm_lora.lora.layer": ("LoRALayer",),
    "tfimm_lora.lora.layers": (
        "LoRAConv2D",
        "LoRADense",
        "LoRADepthwiseConv2D",
        "LoRAEinsumDense",
        "convert_to_lora_layer",
    ),
    "tfimm_lora.lora.merge": ("lora_layers", "merge_lora_weights", "unmerge_lora_weights"),
    "tfimm_lora.lora.model": ("LoRAModel",),
    "tfimm_lora.lora.per_example": ("adapter_ids",),
    "tfimm_lora.lora.optimizer_hooks": ("prepare_optimizer",),
    "tfimm_lora.lora.registry": (
        "lora_architecture",
        "lora_base_architecture",
        "lora_config",
        "register_lora_architecture",
    ),
    "tfimm_lora.lora.several": (
        "active_adapters",
        "adapter_names",
        "add_adapter",
        "delete_adapter",
        "disable_adapters",
        "set_adapter",
    ),
    "tfimm_lora.lora.swap": ("swap_adapter",),
    "tfimm_lora.lora.merge_drift": ("MergeDrift",),
    "tfimm_lora.lora.quantizing": ("quantize",),
    "tfimm_lora.lora.regular": ("convert_to_regular_model",),
    "tfimm_lora.lora.trainable": (
        "lora_non_trainable_weights",
        "lora_trainable_weights",
        "print_trainable_parameters",
        "set_trainable",
    ),
    "tfimm_lora.lora.training_hooks": ("rank_history",),
    "tfimm_lora.lora.vit": ("LoRAViT", "LoRAViTConfig"),
    "tfimm_lora.weights.names": ("LORA_WEIGHT_NAMES",),
}

__all__ = [
    "LORA_WEIGHT_NAMES",
    "LoRAConfig",
    "LoRAConv2D",
    "LoRAConvNeXt",
    "LoRAConvNeXtConfig",
    "LoRADense",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAFunctional",
    "LoRALayer",
    "LoRAModel",
    "LoRAViT",
    "LoRAViTConfig",
    "MergeDrift",
    "active_adapters",
    "adapter_ids",
    "adapter_names",
    "add_adapter",
    "combine_adapters",
    "convert_to_lora_layer",
    "convert_to_lora_model",
    "convert_to_regular_model",
    "create_model",
    "delete_adapter",
    "disable_adapters",
    "initialize_eva",
    "load_adapter",
    "lora_architecture",
    "lora_base_architecture",
    "lora_config",
    "lora_layers",
    "lora_non_trainable_weights",
    "lora_trainable_weights",
    "merge_lora_weights",
    "prepare_optimizer",
    "print_trainable_parameters",
    "push_adapter_to_hub",
    "quantize",
    "rank_history",
    "register_lora_architecture",
    "save_adapter",
    "set_adapter",
    "set_trainable",
    "swap_adapter",
    "unmerge_lora_weights",
]

__getattr__, __dir__ = lazy_names(
    __name__, {name: module for module, names in _NAMES.items() for name in names}, globals()
)
