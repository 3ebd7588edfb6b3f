"""Images to train on: sources, splits, transforms and batches.

Nothing here imports TensorFlow before images are read, so that a mistyped folder is said at once.
"""

from __future__ import annotations

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.dataset import Dataset, load_dataset
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.evaluation_transform import EvaluationTransform
from tfimm_lora.data.factory import create_transform
from tfimm_lora.data.mixup import Mixup, create_mixup
from tfimm_lora.data.pipeline import training_batches, validation_batches
from tfimm_lora.data.sources import open_source, register_source
from tfimm_lora.data.split import RandomAccessSplit, Source, Split
from tfimm_lora.data.training_transform import TrainingTransform
from tfimm_lora.data.transforms import Resize

__all__ = [
    "DataConfig",
    "DataError",
    "Dataset",
    "EvaluationTransform",
    "Mixup",
    "RandomAccessSplit",
    "Resize",
    "Source",
    "Split",
    "TrainingTransform",
    "create_mixup",
    "create_transform",
    "load_dataset",
    "open_source",
    "register_source",
    "training_batches",
    "validation_batches",
]
