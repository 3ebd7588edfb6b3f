"""What a run was made with: versions, machine, state of the working directory's git repository."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import tfimm_lora

PACKAGES = ("keras", "tensorflow", "tensorflow-cpu", "jax", "torch", "numpy", "safetensors",
            "tensorflow-datasets", "pillow")  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Returns versions, machine and git state as plain values.

    Example:
        >>> describe_environment()["python"]
        '3.12.4'
    """
    return {
        "tfimm_lora": tfimm_lora.__version__,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "keras_backend": os.environ.get("KERAS_BACKEND", "Keras' default"),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "command": sys.argv,
        "git": _git_state(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return run.stdout.strip()
