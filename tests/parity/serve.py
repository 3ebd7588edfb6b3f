"""The oracles' side of ``tests/oracles.py``: answer lines of JSON until the input ends.

This file runs in the oracle's environment and needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Answers ``{"operation": name, "arguments": {...}}`` with ``{"result": ...}`` or ``error``."""
    # What libraries print must not get between the answers: it goes to the error stream.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": operations[request["operation"]](**request["arguments"])}
            text = json.dumps(answer)
        except Exception:
            text = json.dumps({"error": traceback.format_exc()})
        answers.write(text + "\n")


def load_module(path: str) -> ModuleType:
    """Imports a Python file by its path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
