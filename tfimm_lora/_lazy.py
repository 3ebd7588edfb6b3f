"""Public names that are imported when they are first used.

``tfimm-lora --help`` and the model tables need no Keras; only what builds a model pays for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(
    package: str, names: dict[str, str], namespace: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns a module's ``__getattr__`` and ``__dir__`` (PEP 562).

    Args:
        package: ``__name__`` of the module.
        names: For each public name the module that defines it; a name that maps to itself
            (``"package.name"``) is a submodule.
        namespace: ``globals()`` of the module, where a resolved name is kept.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        value = module if names[name] == f"{package}.{name}" else getattr(module, name)
        namespace[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *names})

    return __getattr__, __dir__
