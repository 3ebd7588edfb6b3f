"""Registers the package's classes with Keras, when there is a Keras.

Keras restores a saved model only from classes that were registered before, and imports no foreign
module to find them. So they are registered with ``import tfimm_lora`` if Keras is loaded by then,
and else as soon as it is: names and tables of models need no Keras.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULES = (
    "tfimm_lora.models.features",
    "tfimm_lora.quantization.layers",
    "tfimm_lora.quantization.models",
    "tfimm_lora.lora.functional",
    "tfimm_lora.lora.convnext",
    "tfimm_lora.lora.vit",
)


def register_classes() -> None:
    """Imports every module that registers classes, now or behind the import of Keras."""
    if "keras" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _UntilKeras())


def _register() -> None:
    for name in _MODULES:
        importlib.import_module(name)


class _UntilKeras(importlib.abc.MetaPathFinder):
    """Watches imports of Keras and of this package until Keras is there, and then registers.

    Keras may be imported by one of our own modules, which is incomplete at that time: so classes
    are registered when the outermost of the watched imports is complete.
    """

    def __init__(self) -> None:
        self._searching = False
        self._depth = 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if self._searching or not (name == "keras" or name.startswith("tfimm_lora.")):
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            if self._depth == 0 and "keras" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module
