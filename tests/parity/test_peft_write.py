"""Adapters that we saved, loaded by PEFT: no key is missing or left over, and equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle, OracleError
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


def test_named_adapter(peft_oracle: Oracle, tmp_path: Path) -> None:
    """Any name but ``default`` is a folder of its own, for PEFT and for us."""
    case = peft_oracle.case("generate", name=BASES["vit"])
    arguments = base_arguments(case)
    model = lora.create_model("test_vit", **arguments, lora_targets=["attn.q", "attn.v"])
    move_trainable(model)
    logits = np.asarray(model(load(case, "input"), training=False))
    np.save(tmp_path / "logits.npy", logits)
    lora.save_adapter(model, str(tmp_path), name="second")
    report = peft_oracle.call(
        "verify",
        case=str(case),
        adapter=str(tmp_path / "second"),
        logits=str(tmp_path / "logits.npy"),
    )
    assert report["ok"], report
    again = lora.load_adapter(
        tfimm_lora.create_model("test_vit", **arguments), str(tmp_path), name="second"
    )
    np.testing.assert_array_equal(np.asarray(again(load(case, "input"), training=False)), logits)


def test_peft_refuses_our_depthwise_updates(peft_oracle: Oracle, tmp_path: Path) -> None:
    """PEFT's own update of a depthwise kernel is another one: an error, not another answer."""
    case = peft_oracle.case("generate", name=BASES["convmlp"])
    name = load_meta(case)["timm_name"]
    model = lora.create_model(name, **base_arguments(case), lora_targets=["conv_dw"], lora_rank=16)
    move_trainable(model)
    logits = np.asarray(model(load(case, "input"), training=False))
    np.save(tmp_path / "logits.npy", logits)
    with pytest.warns(UserWarning, match="depthwise"):
        lora.save_adapter(model, str(tmp_path / "adapter"))
    with pytest.raises(OracleError, match=r"size mismatch|divisible"):
        peft_oracle.call(
            "verify",
            case=str(case),
            adapter=str(tmp_path / "adapter"),
            logits=str(tmp_path / "logits.npy"),
        )
    again = lora.load_adapter(
        tfimm_lora.create_model(name, **base_arguments(case)), str(tmp_path / "adapter")
    )
    np.testing.assert_array_equal(np.asarray(again(load(case, "input"), training=False)), logits)
