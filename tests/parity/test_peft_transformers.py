"""Adapters of PEFT on models of the library transformers, loaded onto ours.

transformers has queries, keys and values as layers of their own, here they are slices of one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import load, relative_error
from tests.parity.test_transformers_foreign import LABELS, SIZE, convnext, vit
from tfimm_lora import lora
from tfimm_lora.lora.peft.transformers_names import timm_names

TOLERANCE = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*the adapter has .* weights where the kernel")
VIT, DEIT = "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"
QV = ["q_proj", "v_proj"]
HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": (VIT, "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": QV}),
    "lora-head": (VIT, "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": QV, **HEAD}),
    "lora-every": (VIT, "LoraConfig", {"r": 3, "target_modules": EVERY, **HEAD}),
    "lora-all-linear": (VIT, "LoraConfig", {"r": 3, "target_modules": "all-linear"}),
    "lora-regex": (VIT, "LoraConfig", {"r": 3, "target_modules": r".*\.1\..*(k_proj|fc2)"}),
    "lora-layers": (
        VIT, "LoraConfig", {"r": 3, "target_modules": QV, "layers_to_transform": [1]},
    ),
    "lora-patches": (VIT, "LoraConfig", {"r": 3, "target_modules": ["projection", "v_proj"]}),
    "lora-patterns": (
        VIT, "LoraConfig",
        {"r": 4, "lora_alpha": 8, "target_modules": QV, "rank_pattern": {"q_proj": 2},
         "alpha_pattern": {"layers.1.attention.v_proj": 3}},
    ),
    "lora-bias": (
        VIT, "LoraConfig", {"r": 4, "target_modules": QV, "bias": "lora_only", **HEAD},
    ),
    "lora-bias-all": (VIT, "LoraConfig", {"r": 4, "target_modules": QV, "bias": "all"}),
    "rslora": (VIT, "LoraConfig", {"r": 4, "use_rslora": True, "target_modules": QV}),
    "dora": (VIT, "LoraConfig", {"r": 4, "use_dora": True, "target_modules": [*QV, "fc1"]}),
    "loha": (VIT, "LoHaConfig", {"r": 4, "target_modules": QV, **HEAD}),
    "lokr": (VIT, "LoKrConfig", {"r": 4, "target_modules": QV}),
    "adalora": (
        VIT, "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": QV},
    ),
    "ia3": (
        VIT, "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    "oft": (VIT, "OFTConfig", {"r": 0, "oft_block_size": 8, "target_modules": ["o_proj"]}),
    "norms": (VIT, "LNTuningConfig", {"target_modules": ["layernorm_before", "layernorm"]}),
    "deit": (
        DEIT, "LoraConfig",
        {"r": 4, "target_modules": QV,
         "modules_to_save": ["cls_classifier", "distillation_classifier"]},
    ),
    "convnext": (
        "ConvNextForImageClassification", "LoraConfig",
        {"r": 3, "target_modules": ["pwconv1", "pwconv2", "downsampling_layer.1"], **HEAD},
    ),
}  # fmt: skip


def make(oracle: Oracle, model: str, kind: str, fields: dict[str, Any]) -> Path:
    config = convnext(**LABELS) if "ConvNext" in model else vit(**LABELS)
    size = 2 * SIZE if "ConvNext" in model else SIZE
    return oracle.case("adapter", name=model, config=config, size=size, kind=kind, fields=fields)


def base_model(case: Path, model: str) -> Any:
    if "ConvNext" in model:
        arch, fields = "convnext_tiny", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
        fields |= {"input_size": (2 * SIZE, 2 * SIZE)}  # type: ignore[dict-item]
    else:
        arch = "deit_tiny_distilled_patch16_224" if model == DEIT else "vit_tiny_patch16_224"
        fields = {"embed_dim": 96, "depth": 2, "num_heads": 3, "patch_size": 8}  # type: ignore
        fields |= {"input_size": (SIZE, SIZE)}  # type: ignore[dict-item]
    return tfimm_lora.create_model(
        arch, model_path=case / "model.safetensors", nb_classes=5, **fields
    )


@pytest.mark.parametrize("name", CASES)
def test_logits(
    name: str, transformers_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    model, kind, fields = CASES[name]
    case = make(transformers_oracle, model, kind, fields)
    base, images = base_model(case, model), load(case, "input")
    adapted = lora.load_adapter(base, case / "adapter")
    wanted = load(case, "logits_adapter")
    assert relative_error(base(images), wanted) > 1e-2, "the adapter says nothing"
    errors = {"adapter": relative_error(adapted(images), wanted)}
    errors["regular"] = relative_error(lora.convert_to_regular_model(adapted)(images), wanted)
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", ["lora-head", "lora-bias", "dora", "loha", "ia3"])
def test_saved_again(name: str, transformers_oracle: Oracle, tmp_path: Path) -> None:
    """In our files the slices are one adapter of the fused layer."""
    model, kind, fields = CASES[name]
    case = make(transformers_oracle, model, kind, fields)
    adapted = lora.load_adapter(base_model(case, model), case / "adapter")
    lora.save_adapter(adapted, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".attn.qkv." in key for key in keys) and not any(".attn.q." in key for key in keys)
    again = lora.load_adapter(base_model(case, model), tmp_path)
    images = load(case, "input")
    assert relative_error(again(images), np.asarray(adapted(images))) <= 1e-6


def older(text: str) -> str:
    """A name of transformers 5 as version 4 has it."""
    rules = {
        r"vit\.layers\.": "vit.encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    for new, old in rules.items():
        text = re.sub(new, old, text)
    return text


def test_names_of_older_versions(transformers_oracle: Oracle, tmp_path: Path) -> None:
    """The tutorial's query and value, and a file that lacks one of them."""
    model, kind, fields = CASES["lora-every"]
    case = make(transformers_oracle, model, kind, fields)
    tensors = load_file(case / "adapter" / "adapter_model.safetensors")
    tensors = {older(key): value for key, value in tensors.items()}
    assert any("attention.attention.query" in key for key in tensors)
    config = json.loads((case / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "key", "value", "dense"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapted = lora.load_adapter(base_model(case, model), tmp_path)
    wanted = load(case, "logits_adapter")
    assert relative_error(adapted(load(case, "input")), wanted) <= TOLERANCE
    left = {k: v for k, v in tensors.items() if "layer.1.attention.attention.value" not in k}
    save_file(left, tmp_path / "adapter_model.safetensors")
    message = r"also mean vit.encoder.layer.1.attention.attention.value, which the file has no"
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(base_model(case, model), tmp_path)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("dinov2.encoder.layer.2.attention.q_proj", "blocks.2.attn.q"),
        ("dinov2.encoder.layer.2.attention.attention.value", "blocks.2.attn.v"),
        ("dinov2.encoder.layer.2.mlp.fc1", "blocks.2.mlp.fc1"),
        ("dinov2_with_registers.encoder.layer.0.attention.o_proj", "blocks.0.attn.proj"),
        ("deit.encoder.layer.3.attention.output.dense", "blocks.3.attn.proj"),
        ("ijepa.layers.0.mlp.fc2", "blocks.0.mlp.fc2"),
        ("vision_model.encoder.layers.4.self_attn.k_proj", "blocks.4.attn.k"),
        ("vision_model.encoder.layers.4.self_attn.out_proj", "blocks.4.attn.proj"),
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.layernorm", "norm"),
        ("convnextv2.encoder.stages.1.layers.0.pwconv2", "stages.1.blocks.0.mlp.fc2"),
    ],
)
def test_names(there: str, here: str) -> None:
    assert timm_names([f"{there}.lora_A.weight"], ["blocks.0.mlp"]) == {
        f"{there}.lora_A.weight": f"{here}.lora_A.weight"
    }
    assert timm_names([f"{here}.lora_A.weight"], [here]) is None
