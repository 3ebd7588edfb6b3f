"""What benchmarks share: where they ran, and models cut short for a trial."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, number of cores and versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((li.partition(": ")[2] for li in lines if li.startswith("model name")), model)
    packages = ("keras", "tensorflow", "jax", "numpy")
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def fewer_blocks(name: str, blocks: int | None) -> dict[str, Any]:
    """Config fields that leave a model so many blocks (a ConvNeXt so many per stage)."""
    if not blocks:
        return {}
    return {"depth": blocks} if name.startswith("vit") else {"depths": (blocks,) * 4}
