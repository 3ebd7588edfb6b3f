"""The 68 cases of PEFT's oracle, and what is particular about some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors.numpy import save_file

from tests.parity.adapters import base_model, with_adapter
from tests.parity.compare import load_tensors
from tfimm_lora import lora

LORA = [
    "lora-vit-qkv", "lora-vit-all-linear", "lora-vit-regex", "lora-vit-layers", "lora-vit-exclude",
    "rslora-vit", "lora-vit-gaussian-init", "lora-vit-lora-bias", "lora-vit-rank-pattern",
    "lora-vit-bias-lora-only", "lora-vit-bias-all", "lora-vit-head", "lora-vit-head-bias-all",
    "lora-vit-patch-embed", "lora-vit-pissa", "lora-vit-pissa-niter", "lora-vit-olora",
    "lora-vit-orthogonal", "lora-vit-mica", "dora-vit", "dora-vit-rslora", "dora-convnext-conv",
    "dora-convnext-1x1", "lora-convnext-mlp", "lora-convnext-doc-regex",
    "lora-convnext-all-linear", "lora-convnext-conv-kxk", "lora-convnext-conv1x1",
    "lora-convnext-depthwise", "lora-convnext-conv-bias", "lora-convnext-head-mts", "qalora-vit",
]  # fmt: skip
OTHERS = [
    "loha-vit", "loha-vit-head-patterns", "loha-convnext-conv", "loha-convnext-conv-effective",
    "loha-convnext-1x1", "lokr-vit", "lokr-vit-full", "lokr-vit-decompose-both",
    "lokr-vit-factor", "lokr-convnext-conv", "lokr-convnext-conv-effective", "lokr-convnext-1x1",
    "lokr-vit-lycoris-init", "adalora-vit", "adalora-vit-pruned", "adalora-convnext-conv",
    "vera-vit", "vera-vit-noproj", "ia3-vit", "ia3-convnext-conv", "oft-vit", "oft-vit-neumann",
    "oft-vit-share", "oft-convnext-1x1", "boft-vit", "ln-tuning-vit", "ln-tuning-convnext",
]  # fmt: skip
COMBINED = [
    "weighted-linear", "weighted-cat", "weighted-svd", "weighted-ties",
    "weighted-magnitude-prune", "weighted-ties-svd", "weighted-magnitude-prune-svd",
    "weighted-linear-rslora", "weighted-svd-conv",
]  # fmt: skip
ALL = [*LORA, *OTHERS, *COMBINED]

UNMERGED = {"lora-convnext-depthwise", "qalora-vit"}
"""PEFT cannot merge these."""

RANDOM_START = "lora-vit-pissa-niter"
"""Its base weights were rewritten with a random decomposition, which only the adapter's first state
records: PEFT itself cannot reload it without."""

WRONG_IN_PEFT = {"loha-convnext-conv-effective": ("hada_w1_a", "hada_w2_a")}
"""Tensors for which PEFT's hand-written backward pass contracts with the wrong factor."""


def loaded(case: Path, name: str, tmp_path: Path) -> keras.Model:
    """The case's base model with the adapter that PEFT saved."""
    if name != RANDOM_START:
        return with_adapter(case)
    return lora.load_adapter(base_model(case), str(_converted(case, tmp_path / "converted")))


def _converted(case: Path, folder: Path) -> Path:
    """The adapter without its start: s (B A - B0 A0) as one adapter of twice the rank."""
    folder.mkdir()
    now, start = (
        load_tensors(case / f / "adapter_model.safetensors") for f in ("adapter", "adapter_init")
    )
    factors = {}
    for key, value in now.items():
        if "lora_A" in key:
            factors[key] = np.concatenate([value, start[key]])
        else:
            factors[key] = np.concatenate([value, -start[key]], axis=1)
    save_file(factors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = json.loads((case / "adapter" / "adapter_config.json").read_text())
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    return folder
