"""What turns an architecture into its LoRA variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.lora.layers import convert_to_lora_layer
from tfimm_lora.lora.replace import parent_of, replace_sublayer
from tfimm_lora.lora.targets import Target, find_targets
from tfimm_lora.lora.trainable import fully_trained_layers, set_trainable


class LoRAModel:
    """Mixin in front of an architecture: ``class LoRAViT(LoRAModel, ViT)``.

    The architecture's constructor creates its layers, unbuilt; those that the config targets are
    then replaced by their LoRA versions, before anything is built. At the end of ``build`` the
    ``trainable`` flags of all weights are set from the config.

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
        super().__init__(cfg, **kwargs)  # type: ignore[call-arg]
        classifier = classifier_paths(cfg)
        targets = find_targets(
            self,
            cfg,
            self.lora_default_targets,
            self.lora_target_groups,
            self.lora_slices,
            classifier,
        )
        adapted = {t.module for t in targets} & set(classifier)
        if cfg.lora_train_classifier and adapted:
            raise ValueError(
                f"The classifier {min(adapted)!r} is targeted by lora_targets and trained in full "
                "by lora_train_classifier=True. Use one of the two."
            )
        insert_lora_layers(self, targets)

    def build(self, input_shape: Any) -> None:
        """Builds the architecture, then sets which weights are trained."""
        super().build(input_shape)  # type: ignore[misc]
        set_trainable(self, self.cfg.lora_train_bias, self.lora_trainable_layers)

    @property
    def lora_trainable_layers(self) -> list[str]:
        """Paths of layers that are trained in full: perhaps the classifier, and chosen ones."""
        return fully_trained_layers(self)


def insert_lora_layers(model: Any, targets: Sequence[Target]) -> None:
    """Replaces unbuilt target layers of a model by their LoRA versions, in place.

    Args:
        model: A model that is not built.
        targets: What to replace.
    """
    for target in targets:
        new = convert_to_lora_layer(target.layer, **target.arguments)
        replace_sublayer(parent_of(model, target.layer), target.layer, new)
