"""Linear probe: the classifier is trained, on features that stay as they are."""

from __future__ import annotations

from typing import Any

from tfimm_lora.lora.methods.in_place import InPlaceMethod
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import iterate_layers, timm_path


class LinearProbe(InPlaceMethod):
    """Trains the classifier and nothing else."""

    name = "linear_probe"
    trains_classifier = True

    @classmethod
    def check_model(cls, model: Any, fields: Any) -> None:
        """Raises unless the model has a classifier.

        Raises:
            ValueError: It has none, for example because of ``nb_classes=0``.
        """
        from tfimm_lora.lora.trainable import classifier_of

        modules = [timm_path(path) for path, _ in iterate_layers(model)]
        wanted = classifier_of(model)
        if not any(is_below(m + ".", wanted) for m in modules):
            raise ValueError(
                "lora_method='linear_probe' trains the classifier, and the model has none "
                f"({', '.join(wanted) or 'no layer classifies'} is missing). Create it with "
                "nb_classes of at least 1."
            )
