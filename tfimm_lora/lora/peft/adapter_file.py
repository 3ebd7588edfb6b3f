"""What an adapter's two files say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class AdapterFile:
    """What an adapter's two files say.

    Attributes:
        source: Path of the weights file, for messages.
        config: Content of ``adapter_config.json``.
        own: What this package recorded; empty if PEFT wrote the files.
        fields: ``lora_`` fields.
        tensors: Tensors by timm name; those that PEFT stores once for all modules by their name.
    """

    source: str
    config: dict[str, Any]
    own: dict[str, Any]
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
