"""Adapters that we saved, loaded by PEFT: no key is missing or left over, and equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles import Oracle
from tests.parity.adapters import base_arguments
from tests.parity.compare import load, load_meta, move_trainable
from tfimm_lora import lora

TOLERANCE = 2e-5

# Cases of the oracle that bring a base model.
BASES = {
    "vit": "lora-vit-qkv",
    "convnext": "lora-convnext-mlp",
    "convmlp": "lora-convnext-conv1x1",
}

SAVED = {
    "qkv": ("vit", {"lora_targets": ["attn.qkv"], "lora_rank": 4, "lora_alpha": 8}),
    "q-v": ("vit", {"lora_targets": ["attn.q", "attn.v"], "lora_rank": 3, "lora_alpha": 6}),
    "q": ("vit", {"lora_targets": ["attn.q"], "lora_rank": 4}),
    "k-v": ("vit", {"lora_targets": ["attn.k", "attn.v"], "lora_rank": 2, "lora_alpha": 1}),
    "q-k-v": ("vit", {"lora_targets": ["attn.q", "attn.k", "attn.v"], "lora_rank": 2}),
    "q-v-and-mlp": (
        "vit",
        {"lora_targets": ["attn.q", "attn.v", "attn.proj", "mlp.fc1"], "lora_rank": 4},
    ),
    "q-v-rslora": (
        "vit",
        {
            "lora_targets": ["attn.q", "attn.v"],
            "lora_rank": 4,
            "lora_alpha": 2,
            "lora_method": "rslora",
        },
    ),
    "rslora": (
        "vit",
        {
            "lora_targets": ["attn.qkv", "mlp.fc2"],
            "lora_rank": 8,
            "lora_alpha": 4,
            "lora_method": "rslora",
        },
    ),
    "default-targets": ("vit", {"lora_rank": 4}),
    "one-block": ("vit", {"lora_targets": ["blocks.1.*"], "lora_rank": 4, "lora_alpha": 2}),
    "patterns": (
        "vit",
        {
            "lora_targets": ["attn.qkv", "mlp.fc1"],
            "lora_rank": 4,
            "lora_alpha": 8,
            "lora_rank_pattern": {"blocks.0.attn.qkv": 2, "blocks.1.mlp.fc1": 6},
            "lora_alpha_pattern": {"blocks.2.mlp.fc1": 3},
        },
    ),
    "q-v-patterns": (
        "vit",
        {
            "lora_targets": ["attn.q", "attn.v"],
            "lora_rank": 4,
            "lora_alpha": 8,
            "lora_rank_pattern": {"blocks.0.attn.q": 2, "blocks.0.attn.v": 2},
        },
    ),
    "bias-lora-only": (
        "vit",
        {"lora_targets": ["attn.qkv"], "lora_rank": 4, "lora_train_bias": "lora_only"},
    ),
    "q-v-bias-lora-only": (
        "vit",
        {"lora_targets": ["attn.q", "attn.v"], "lora_rank": 4, "lora_train_bias": "lora_only"},
    ),
    "bias-all": ("vit", {"lora_targets": ["mlp.fc2"], "lora_rank": 4, "lora_train_bias": "all"}),
    "head": (
        "vit",
        {"lora_targets": ["attn.q", "attn.v"], "lora_rank": 4, "lora_train_classifier": True},
    ),
    "head-bias-all": (
        "vit",
        {
            "lora_targets": ["attn.qkv"],
            "lora_rank": 4,
            "lora_train_bias": "all",
            "lora_train_classifier": True,
        },
    ),
    "patch-embedding": (
        "vit",
        {"lora_targets": ["patch_embed.proj", "attn.qkv"], "lora_rank": 4, "lora_alpha": 4},
    ),
    "convnext": ("convnext", {"lora_rank": 4, "lora_alpha": 8}),
    "convnext-kxk": (
        "convnext",
        {"lora_targets": ["stem.0", "downsample.1"], "lora_rank": 4, "lora_alpha": 8},
    ),
    "convnext-head": (
        "convnext",
        {"lora_targets": ["mlp.fc1"], "lora_rank": 4, "lora_train_classifier": True},
    ),
    "convnext-bias-all": (
        "convnext",
        {"lora_targets": ["mlp.fc1"], "lora_rank": 4, "lora_train_bias": "all"},
    ),
    "convmlp": ("convmlp", {"lora_rank": 4, "lora_alpha": 8}),
    "convnext-whole-head-bias-all": (
        "convnext",
        {
            "lora_targets": ["mlp.fc1"],
            "lora_rank": 4,
            "lora_train_bias": "all",
            "lora_modules_to_save": ["head.norm", "head.fc"],
        },
    ),
    "convmlp-rslora": (
        "convmlp",
        {"lora_targets": ["mlp.fc2", "stem.0"], "lora_rank": 4, "lora_method": "rslora"},
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_peft_answers_the_same(
    name: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    base, options = SAVED[name]
    case = peft_oracle.case("generate", name=BASES[base])
    model = lora.create_model(load_meta(case)["timm_name"], **base_arguments(case), **options)
    move_trainable(model)
    logits = np.asarray(model(load(case, "input"), training=False))
    assert np.abs(logits - load(case, "logits_base")).max() > 0.01, "the adapter says nothing"
    np.save(tmp_path / "logits.npy", logits)
    lora.save_adapter(model, str(tmp_path / "adapter"))
    report = peft_oracle.call(
        "verify",
        case=str(case),
        adapter=str(tmp_path / "adapter"),
        logits=str(tmp_path / "logits.npy"),
    )
    for problem in (
        "missing_in_file",
        "unexpected_in_file",
        "from_pretrained_warnings",
        "non_float32",
    ):
        assert not report[problem], (problem, report[problem])
    # PEFT writes the head's bias three times with bias="all", and then drops this one itself.
    assert all(k.endswith(".modules_to_save.bias") for k in report["peft_unexpected"])
    errors = {
        "strict": report["max_abs_diff"] / float(logits.std()),
        "from_pretrained": report["from_pretrained_vs_strict"] / float(logits.std()),
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors
