"""Every architecture answers what timm answers, with weights that hide nothing.

Each run compares at least one model of every kind; the others are the slow sweep
(``pytest tests/parity --sample-slow 1``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import ALL, our_overrides, reduced, timm_case
from tests.parity.compare import TIMM_TOLERANCE, load, load_tensors, relative_error, timm_weights

EVERY_RUN = (
    "convnext_atto",  # MLPs of 1x1 convolutions
    "convnext_atto_ols",  # tiered overlapping stem
    "convnext_atto_rms",
    "convnext_tiny",
    "convnext_tiny_hnf",  # normalises in front of pooling
    "convnext_nano_ols",  # overlapping stem
    "convnext_zepto_rms_ols",  # activation in the stem, simple norm
    "convnextv2_atto",
    "convnextv2_tiny",
    "test_convnext",  # tanh GELU, epsilon 1e-5
    "test_convnext3",  # a kernel size per stage, SiLU
    "deit3_small_patch16_224",
    "deit_tiny_patch16_224",
    "test_vit",
    "test_vit2",  # register in the position table, average of the patches
    "vit_base_patch14_dinov2",
    "vit_base_patch16_224",
    "vit_betwixt_patch16_gap_256",  # no qkv bias, normalises in front of pooling
    "vit_medium_patch16_reg4_gap_256",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch32_224",
    "vit_small_patch8_224",
    "vit_so150m_patch16_reg4_gap_256",  # a hidden width that is no multiple
    "vit_tiny_patch16_224",
    "vit_xsmall_patch16_clip_224",  # normalises before the blocks, epsilon 1e-5
)


def every_architecture() -> list[Any]:
    """All registered names; those outside of ``EVERY_RUN`` are slow."""
    return [pytest.param(n, marks=() if n in EVERY_RUN else pytest.mark.slow, id=n) for n in ALL]


def test_the_small_choice_is_registered() -> None:
    assert set(EVERY_RUN) <= set(ALL)


@pytest.mark.parametrize("name", every_architecture())
def test_features_and_logits_equal_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any], record_property: Any
) -> None:
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, request) as case:
        model = tfimm_lora.create_model(
            name, model_path=str(case / "weights.safetensors"), **our_overrides(request)
        )
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


@pytest.mark.parametrize("name", ["test_convnext2", "test_vit2", "vit_small_patch14_reg4_dinov2"])
def test_every_weight_has_the_value_of_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any]
) -> None:
    """Also those that no output shows, such as the keys' part of the qkv bias."""
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, request) as case:
        path = case / "weights.safetensors"
        ours = timm_weights(
            tfimm_lora.create_model(name, model_path=str(path), **our_overrides(request))
        )
        theirs = load_tensors(path)
    assert sorted(ours) == sorted(theirs)
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


EPSILON_PROBES = (
    "convnext_atto_rms",
    "convnext_tiny",
    "convnext_tiny_hnf",
    "convnext_zepto_rms_ols",
    "convnextv2_atto",
    "test_convnext",
    "deit3_small_patch16_224",
    "deit_tiny_patch16_224",
    "test_vit2",
    "vit_betwixt_patch16_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
)


@pytest.mark.parametrize("name", EPSILON_PROBES)
def test_every_epsilon_is_that_of_timm(
    name: str, timm_oracle: Oracle, zoo: dict[str, Any], record_property: Any
) -> None:
    """The inputs of the norms are so small that a wrong epsilon moves the logits by 3% and more."""
    facts = zoo["archs"][name]
    request = reduced(facts)
    with timm_case(timm_oracle, name, facts, {**request, "eps_probe": True}) as case:
        model = tfimm_lora.create_model(
            name, model_path=str(case / "weights.safetensors"), **our_overrides(request)
        )
        error = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    record_property("relative_errors", {"eps_probe": error})
    assert error <= TIMM_TOLERANCE


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
        model = tfimm_lora.create_model(
            name, model_path=str(case / "weights.safetensors"), **our_overrides(request)
        )
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
