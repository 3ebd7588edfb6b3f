"""Checkpoints in the names of others, and what timm makes of them.

``drive_foreign.py ORACLE.py``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from foreign_layouts import LAYOUTS, as_pickled
from serve import load_module, serve

oracle = load_module(sys.argv[1])
torch = oracle.torch
torch.set_num_threads(1)


def _store(state: dict[str, Any], out: str, dtype: str) -> dict[str, Any]:
    """Saves and returns a state dict in a type."""
    stored = {
        k: v.to(getattr(torch, dtype)).contiguous() if v.is_floating_point() else v
        for k, v in state.items()
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    oracle.save_file(stored, Path(out, "foreign.safetensors"))
    return stored


def make(
    out: str,
    arch: str,
    layout: str,
    overrides: dict[str, Any] | None = None,
    img_size: Any = None,
    new_size: Any = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Random weights in a foreign layout, and what timm's loader makes a model of them answer.

    ``img_size`` is the size that the weights are for, ``new_size`` that of the loaded model.
    """
    source, x, meta = oracle.build(arch, 0, overrides, img_size)
    foreign = _store(LAYOUTS[layout](source.state_dict()), out, dtype)
    arguments = dict(overrides or {})
    size = new_size or img_size
    if hasattr(source, "patch_embed"):
        arguments["img_size"] = size
    overlay = {
        "state_dict": as_pickled(layout, foreign),
        "input_size": tuple(meta["input_size"]),
        "num_classes": meta["num_classes"],
    }
    arguments.setdefault("num_classes", meta["num_classes"])
    model = oracle.timm.create_model(
        arch, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    ).eval()
    x = torch.randn((2, 3, *size), generator=oracle._stream(0, "input"))
    return oracle._save(model, x, meta, out, fp64=False)


if __name__ == "__main__":
    serve({"make": make})
