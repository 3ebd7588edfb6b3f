"""Tasks: what is learned from the images; each names its loss and its metrics."""

from __future__ import annotations

from tfimm_lora.tasks.base import TASKS, Task, register_task
from tfimm_lora.tasks.classification import Classification

__all__ = ["TASKS", "Classification", "Task", "register_task"]
