"""What a task has to say, and the table of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tfimm_lora.data.registry import Registry

if TYPE_CHECKING:
    import keras


class Task(Protocol):
    """A head's size, its loss and its metrics.

    Attributes:
        score: Name of the metric that runs are compared by, as Keras logs it.
    """

    score: str

    def nb_outputs(self, class_names: tuple[str, ...]) -> int:
        """Number of outputs of the model's head."""

    def loss(self) -> keras.losses.Loss:
        """The loss of logits against labels."""

    def metrics(self) -> list[keras.metrics.Metric]:
        """New metrics of logits against labels."""


TASKS: Registry[type[Task]] = Registry("task")
"""Name to a class of :class:`Task`."""

register_task = TASKS.register
"""Decorator that registers a task, ``@register_task("classification")``."""
