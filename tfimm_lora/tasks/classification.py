"""One class per image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfimm_lora.tasks.base import register_task

if TYPE_CHECKING:
    import keras


@register_task("classification")
class Classification:
    """Softmax cross entropy and accuracy.

    Example:
        >>> model.compile("adamw", loss=Classification().loss(), metrics=Classification().metrics())
    """

    score = "accuracy"

    def nb_outputs(self, class_names: tuple[str, ...]) -> int:
        """One logit per class."""
        return len(class_names)

    def loss(self) -> keras.losses.Loss:
        """Cross entropy of logits, shape (batch, classes), and class indices, shape (batch,)."""
        import keras

        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def metrics(self) -> list[keras.metrics.Metric]:
        """The share of images whose largest logit is their class."""
        import keras

        return [keras.metrics.SparseCategoricalAccuracy(name=self.score)]
