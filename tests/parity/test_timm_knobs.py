"""Constructor arguments one by one and together, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import ALL
from tests.parity.compare import TIMM_TOLERANCE, load, load_meta, relative_error

SMALL_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 11}
SMALL_CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [24, 32, 48, 64], "num_classes": 11}

VIT = [
    {"patch_size": 8, "reg_tokens": 3},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": True, "global_pool": "avg", "reg_tokens": 2},
    {"class_token": True, "global_pool": "avg", "fc_norm": False, "reg_tokens": 1},
    {"global_pool": "token", "fc_norm": True},
    {"no_embed_class": True, "reg_tokens": 4},
    {"pre_norm": True, "act_layer": "quick_gelu"},
    {"final_norm": False},
    {"qkv_bias": False, "init_values": 0.1},
    {"proj_bias": False, "act_layer": "silu"},
    {"qk_norm": True, "qkv_bias": False},
    {"norm_layer": "rmsnorm", "mlp_ratio": 2.6667},
    {"norm_layer": "rmsnorm", "qk_norm": True, "act_layer": "gelu_tanh"},
    {"num_heads": 8, "mlp_ratio": 1.5, "num_classes": 0},
    {"global_pool": "max", "class_token": False},
    {"global_pool": "avgmax", "reg_tokens": 1, "pool_include_prefix": True},
    {"global_pool": "map", "reg_tokens": 2},
    {"global_pool": "map", "pool_include_prefix": True, "norm_layer": "rmsnorm"},
    {"global_pool": "map", "class_token": False, "fc_norm": True, "num_classes": 0},
    {"scale_attn_norm": True, "scale_mlp_norm": True, "qk_norm": True},
    {"embed_norm_layer": "rmsnorm", "norm_layer": "rmsnorm"},
    {"mlp_layer": "glu", "scale_mlp_norm": True, "act_layer": "silu"},
    {"mlp_layer": "swiglu", "scale_mlp_norm": True, "act_layer": "silu"},
    {"attn_layer": "diff", "qk_norm": True, "scale_attn_norm": True},
    {"block_fn": "ResPostBlock", "mlp_layer": "swiglu", "attn_layer": "diff"},
    {"block_fn": "ParallelScalingBlock", "qk_norm": True, "proj_bias": False},
    {"block_fn": "DiffParallelScalingBlock", "qk_norm": True, "qkv_bias": False},
    {"block_fn": "DiffParallelScalingBlock", "init_values": 0.1, "norm_layer": "rmsnorm"},
    {"block_fn": "ParallelThingsBlock", "init_values": 0.1, "scale_attn_norm": True},
    {"in_chans": 1, "num_classes": 1},
]
CONVNEXT = [
    {"use_grn": True},
    {"stem_type": "overlap", "act_layer": "silu"},
    {"stem_type": "overlap_tiered", "head_norm_first": True},
    {"stem_type": "overlap_act", "act_layer": "gelu_tanh"},
    {"patch_size": 2, "kernel_sizes": [3, 7, 5, 3]},
    {"norm_eps": 1e-5, "head_hidden_size": 40},
    {"norm_layer": "simplenorm"},
    {"norm_layer": "rmsnorm2d", "conv_mlp": True},
    {"norm_layer": "simplenorm2d", "conv_mlp": True},
    {"num_classes": 0, "head_hidden_size": 40},
    {"global_pool": "max"},
    {"global_pool": "avgmax", "norm_layer": "simplenorm"},
    {"depths": [2, 1, 1, 1], "dims": [16, 16, 24, 24]},
    {"in_chans": 2, "num_classes": 1},
]


def identifier(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()).replace(" ", "")


def compare(
    oracle: Oracle, name: str, overrides: dict[str, Any], size: list[int], record: Any
) -> None:
    case = oracle.case("make", arch=name, overrides=overrides, img_size=size)
    model = tfimm_lora.create_model(
        name,
        model_path=str(case / "weights.safetensors"),
        input_size=tuple(load_meta(case)["input_size"][1:]),
        **overrides,
    )
    logits = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    features = model.forward_features(load(case, "input"), training=False)
    errors = {"logits": logits, "features": relative_error(features, load(case, "features"))}
    record("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors


@pytest.mark.parametrize("knobs", VIT, ids=identifier)
def test_vit(knobs: dict, timm_oracle: Oracle, record_property: Any) -> None:
    patch = knobs.get("patch_size", 16)
    compare(
        timm_oracle,
        "vit_tiny_patch16_224",
        {**SMALL_VIT, **knobs},
        [3 * patch, 2 * patch],
        record_property,
    )


@pytest.mark.parametrize("knobs", CONVNEXT, ids=identifier)
def test_convnext(knobs: dict, timm_oracle: Oracle, record_property: Any) -> None:
    compare(timm_oracle, "convnext_tiny", {**SMALL_CONVNEXT, **knobs}, [96, 64], record_property)


def test_the_oracles_own_cases(shared_dir: Path, timm_oracle: Oracle, record_property: Any) -> None:
    """Those of ``knob_cases.json`` whose architecture is in this package."""
    cases = json.loads((shared_dir / "oracle" / "knob_cases.json").read_text())["core"]
    ours = [c for c in cases if c["arch"] in ALL]
    assert len(ours) >= 6
    for case in ours:
        size = case["img_size"]
        size = size if isinstance(size, list) else [size, size]
        compare(timm_oracle, case["arch"], case["overrides"], size, record_property)


@pytest.mark.parametrize("call_size", [[80, 48], [16, 64], [48, 48]])
def test_dynamic_image_size(call_size: list[int], timm_oracle: Oracle) -> None:
    """A model that resamples its position table in each call."""
    name = "test_vit2"
    case = timm_oracle.case("make", arch=name, img_size=[48, 48], call_size=call_size)
    model = tfimm_lora.create_model(
        name, model_path=str(case / "weights.safetensors"), input_size=(48, 48)
    )
    assert model.cfg.dynamic_img_size
    assert load(case, "input").shape[1:3] == tuple(call_size)
    error = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    assert error <= TIMM_TOLERANCE


@pytest.mark.parametrize("call_size", [[100, 64], [33, 97]])
def test_convnext_takes_any_size(call_size: list[int], timm_oracle: Oracle) -> None:
    name = "test_convnext"
    case = timm_oracle.case("make", arch=name, img_size=[64, 64], call_size=call_size)
    model = tfimm_lora.create_model(name, model_path=str(case / "weights.safetensors"))
    error = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    assert error <= TIMM_TOLERANCE
