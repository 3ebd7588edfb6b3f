"""Registers the package's classes with Keras.

Keras restores a saved model only from classes that were registered before, and imports no foreign
module to find them. So ``import tfimm_lora`` imports them all.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_MODULES = ("tfimm_lora.lora.functional", "tfimm_lora.lora.convnext", "tfimm_lora.lora.vit")


def is_command_line() -> bool:
    """Whether this process is ``tfimm-lora``, whose help and tables need no Keras."""
    return Path(sys.argv[0]).stem == "tfimm-lora" or "tfimm_lora.cli" in sys.orig_argv


def register_classes() -> None:
    """Imports every module that registers classes, and with them Keras."""
    for name in _MODULES:
        importlib.import_module(name)
