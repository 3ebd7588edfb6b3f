"""Adding an adapter to the layers that its config targets."""

from __future__ import annotations

from typing import Any

from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.targets import find_targets
from tfimm_lora.lora.trainable import classifier_of


def insert_adapter(model: Any, name: str, fields: Any) -> None:
    """Adds an adapter to the layers of a model, whose config says where.

    Raises:
        ValueError: A pattern matches nothing, or a layer cannot be adapted in this way.
    """
    method = METHODS[fields.lora_method]
    method.check_model(model, fields)
    if method.in_place:
        return
    targets = find_targets(
        model,
        fields,
        getattr(model, "lora_default_targets", ("all",)),
        getattr(model, "lora_target_groups", {}),
        getattr(model, "lora_slices", {}),
        _classifier(model, fields),
    )
    adapted = {t.module for t in targets} & set(classifier_of(model))
    if fields.lora_train_classifier and adapted:
        raise ValueError(
            f"The classifier {min(adapted)!r} is targeted by lora_targets and trained in full "
            "by lora_train_classifier=True. Use one of the two."
        )
    for target in targets:
        if not isinstance(target.layer, LoRALayer):
            raise ValueError(
                f"{target.module} cannot get an adapter now: it was not targeted when the model "
                "was converted. Name it in lora_targets then."
            )
    for target in targets:
        target.layer.add_adapter(name, **target.arguments)


def _classifier(model: Any, fields: Any) -> tuple[str, ...]:
    # In a functional model the last layer is a classifier only for adapters that train it.
    if hasattr(model, "lora_classifier") and not fields.lora_train_classifier:
        return ()
    return classifier_of(model)
