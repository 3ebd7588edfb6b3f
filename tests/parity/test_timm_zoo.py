"""Every architecture answers what timm answers, with weights that hide nothing.

Each run compares one model of every schema of weight names, and of every kind that the names do not
show; the others are the slow sweep (``pytest tests/parity --sample-slow 1``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import ALL, our_overrides, reduced, timm_case
from tests.parity.compare import TIMM_TOLERANCE, load, load_tensors, relative_error, timm_weights
from tfimm_lora.models import save_safetensors

EVERY_RUN = (
    "aimv2_large_patch14_224",  # SwiGLU, norm behind the patch embedding, no biases
    "beit3_base_patch16_224",  # norms inside attention and MLP
    "convnext_atto",  # MLPs of 1x1 convolutions
    "convnext_atto_ols",  # tiered overlapping stem
    "convnext_atto_rms",
    "convnext_large_mlp",  # hidden layer in the head
    "convnext_nano_ols",  # overlapping stem
    "convnext_tiny",
    "convnext_tiny_hnf",  # normalises in front of pooling
    "convnext_zepto_rms_ols",  # activation in the stem, simple norm
    "convnextv2_atto",
    "convnextv2_tiny",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",  # two classifiers
    "deit_tiny_patch16_224",
    "eva_large_patch14_196",
    "test_convnext",  # tanh GELU, epsilon 1e-5
    "test_convnext3",  # a kernel size per stage, SiLU
    "test_vit",
    "test_vit2",  # register in the position table, average of the patches
    "test_vit3",  # attention pooling of all tokens
    "test_vit4",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",  # no last norm
    "vit_base_patch16_reg4_gap_256",
    "vit_base_patch16_rpn_224",  # norms behind attention and MLP
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_xp_224",  # parallel blocks, norms of queries and keys
    "vit_betwixt_patch16_gap_256",  # no qkv bias, normalises in front of pooling
    "vit_dpwee_patch16_reg1_gap_256",  # differential attention in parallel blocks
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_giant_patch14_dinov2",  # packed SwiGLU
    "vit_intern300m_patch14_448",
    "vit_medium_patch16_gap_256",
    "vit_medium_patch16_reg4_gap_256",
    "vit_pwee_patch16_reg1_gap_256",  # parallel blocks
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_18x2_224",  # two attentions, two MLPs
    "vit_small_patch8_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256",  # a hidden width that is no multiple
    "vit_so150m_patch16_reg4_map_256",
    "vit_so400m_patch16_radio_v4",
    "vit_xsmall_patch16_clip_224",  # normalises before the blocks, epsilon 1e-5
)


def every_architecture() -> list[Any]:
    """All registered names; those outside of ``EVERY_RUN`` are slow."""
    return [pytest.param(n, marks=() if n in EVERY_RUN else pytest.mark.slow, id=n) for n in ALL]


def test_the_small_choice_has_every_schema_of_names(zoo: dict[str, Any]) -> None:
    assert set(EVERY_RUN) <= set(ALL)
    schemas = {zoo["archs"][name]["keys"] for name in EVERY_RUN}
    assert schemas == set(range(len(zoo["key_schemas"])))
    assert len(schemas) == 36


def our_model(name: str, case: Path, request: dict[str, Any]) -> Any:
    """The model with the weights of a case."""
    return tfimm_lora.create_model(
        name, model_path=case / "weights.safetensors", **our_overrides(request)
    )


@pytest.mark.parametrize("name", every_architecture())
def test_features_and_logits_equal_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any], record_property: Any, tmp_path: Path
) -> None:
    """In both directions: with timm's weights here, and with weights written here in timm."""
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, request) as case:
        model = our_model(name, case, request)
        features = model.forward_features(load(case, "input"), training=False)
        errors = {
            "features": relative_error(features, load(case, "features")),
            "pre_logits": relative_error(
                model.forward_head(features, training=False, pre_logits=True),
                load(case, "pre_logits"),
            ),
            "logits": relative_error(
                model(load(case, "input"), training=False), load(case, "logits")
            ),
        }
        record_property("relative_errors", errors)
        assert max(errors.values()) <= TIMM_TOLERANCE, errors
        written = save_safetensors(model, tmp_path / "ours.safetensors")
        theirs, ours = load_tensors(case / "weights.safetensors"), load_tensors(written)
        assert sorted(ours) == sorted(theirs)
        assert all(np.array_equal(ours[key], value) for key, value in theirs.items())
        timm_oracle.call(
            "load",
            arch=name,
            weights=str(written),
            inputs=str(case / "input.npy"),
            out=str(tmp_path / "logits.npy"),
            overrides=request["overrides"],
            img_size=request["img_size"],
        )
        # torch's kernels depend on where a tensor lies in memory.
        assert relative_error(load(tmp_path, "logits"), load(case, "logits")) <= TIMM_TOLERANCE


@pytest.mark.parametrize("name", every_architecture())
def test_every_epsilon_is_that_of_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any], record_property: Any
) -> None:
    """The inputs of the norms are so small that a wrong epsilon moves the logits by 3% and more."""
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, {**request, "eps_probe": True}) as case:
        model = our_model(name, case, request)
        error = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    record_property("relative_errors", {"eps_probe": error})
    assert error <= TIMM_TOLERANCE


@pytest.mark.parametrize("name", ["test_convnext2", "test_vit2", "vit_small_patch14_reg4_dinov2"])
def test_every_weight_has_the_value_of_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any]
) -> None:
    """Also those that no output shows, such as the keys' part of the qkv bias."""
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, request) as case:
        ours = timm_weights(our_model(name, case, request))
        theirs = load_tensors(case / "weights.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


INTERMEDIATES = (
    "convnext_atto",
    "convnext_tiny_hnf",
    "convnextv2_tiny",
    "test_vit",
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
)


def our_feature(module: str) -> str:
    """The name of a timm module's output among our features, ``""`` if it is not among them."""
    parts = module.split(".")
    if parts[0] == "blocks":
        return f"block_{parts[1]}"
    if parts[0] == "stages" and len(parts) == 4:
        kind = "downsample" if parts[2] == "downsample" else f"block_{parts[3]}"
        return f"stage_{parts[1]}/{kind}" if module[-12:] != "downsample.0" else ""
    return "stem" if module == "stem" else ""


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediate_features_equal_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any], record_property: Any
) -> None:
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, {**request, "intermediates": True}) as case:
        model = our_model(name, case, request)
        logits, features = model(load(case, "input"), training=False, return_features=True)
        with np.load(case / "intermediates.npz") as archive:
            theirs = {our_feature(k): v for k, v in archive.items() if our_feature(k)}
        theirs["logits"] = load(case, "logits")
        theirs["features"] = load(case, "pre_logits")
    blocks = [n for n in model.feature_names if "block_" in n]
    assert sorted(n for n in theirs if "block_" in n) == sorted(blocks)
    assert sorted(features) == sorted(model.feature_names)
    errors = {key: relative_error(features[key], value) for key, value in theirs.items()}
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(features["logits"]))
