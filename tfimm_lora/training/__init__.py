"""Training: recipes, methods, runs.

Example:
    >>> from tfimm_lora.training import DataConfig, ModelSection, RunConfig, run
    >>> folder, metrics = run(
    ...     RunConfig(ModelSection("vit_tiny_patch16_224"), DataConfig("folder:flowers"))
    ... )
"""

from __future__ import annotations

from tfimm_lora.data import DataConfig
from tfimm_lora.training.config import LoraSection, ModelSection, RunConfig, TrainSection
from tfimm_lora.training.console import Console
from tfimm_lora.training.errors import RecipeError
from tfimm_lora.training.run import TrainingFailed, run

__all__ = [
    "Console",
    "DataConfig",
    "LoraSection",
    "ModelSection",
    "RecipeError",
    "RunConfig",
    "TrainSection",
    "TrainingFailed",
    "run",
]
