"""Adapters of every method that we saved, loaded by PEFT: exact keys, and equal logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle, OracleError
from tests.parity.adapters import base_arguments
from tests.parity.compare import load, load_meta, move_trainable
from tfimm_lora import lora
from tfimm_lora.lora.methods import METHODS

TOLERANCE = 2e-5

# Cases of the oracle that bring a base model, and what is adapted.
SITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "whole": ("lora-vit-qkv", ("attn.qkv", "mlp.fc2")),
    "slices": ("lora-vit-qkv", ("attn.q", "attn.v")),
    "slices-and-whole": ("lora-vit-qkv", ("attn.k", "mlp.fc1")),
    "conv-1x1": ("lora-convnext-conv1x1", ("mlp.fc1", "mlp.fc2")),
    "conv": ("lora-convnext-mlp", ("stem.0", "downsample.1")),
}
METHODS_OF_PEFT = {
    "lora": {}, "rslora": {}, "dora": {}, "adalora": {}, "vera": {}, "loha": {}, "lokr": {},
    "ia3": {}, "oft": {"block_size": 8, "cayley_neumann": False}, "boft": {"block_size": 8},
    "qalora": {"group_size": 8},
}  # fmt: skip
# PEFT's forms have a slice's part in them.
PACKED = {"lora", "rslora", "dora", "adalora", "loha", "ia3", "qalora"}
# VeRA adapts no convolutions there, QA-LoRA only linear layers of GPTQ.
LINEAR_ONLY = {"vera", "qalora"}
# Its unmerged answer is wrong there: overlapping windows are rotated and summed.
WRONG_IN_PEFT = {("oft", "conv")}
CELLS = [
    (method, site)
    for method in METHODS_OF_PEFT
    for site in SITES
    if not (site.startswith("slices") and method not in PACKED)
    and not (site.startswith("conv") and method in LINEAR_ONLY)
]

pytestmark = pytest.mark.filterwarnings("ignore:.*the adapter has .* weights where the kernel")


def create(case: Path, method: str, targets: tuple[str, ...], **more: Any) -> Any:
    more = {"lora_options": METHODS_OF_PEFT.get(method, {}), **more}
    model = lora.create_model(
        load_meta(case)["timm_name"], **base_arguments(case), lora_method=method, lora_rank=4,
        lora_alpha=6, lora_targets=targets, **more,
    )  # fmt: skip
    move_trainable(model)
    return model


def saved(model: Any, case: Path, folder: Path) -> np.ndarray:
    logits = np.asarray(model(load(case, "input"), training=False))
    assert np.abs(logits - load(case, "logits_base")).max() > 0.01, "the adapter says nothing"
    np.save(folder / "logits.npy", logits)
    lora.save_adapter(model, folder / "adapter")
    return logits


def loaded_again(case: Path, folder: Path) -> np.ndarray:
    base = tfimm_lora.create_model(load_meta(case)["timm_name"], **base_arguments(case))
    return np.asarray(lora.load_adapter(base, folder / "adapter")(load(case, "input")))


def verified(oracle: Oracle, case: Path, folder: Path) -> dict[str, Any]:
    report = oracle.call(
        "verify", case=str(case), adapter=str(folder / "adapter"),
        logits=str(folder / "logits.npy"),
    )  # fmt: skip
    for problem in ("missing_in_file", "unexpected_in_file", "non_float32", "peft_unexpected"):
        assert not report[problem], (problem, report[problem])
    assert not report.get("from_pretrained_warnings")
    return report


def test_every_method_of_peft_is_here() -> None:
    known = {name for name, method in METHODS.items() if method.peft_type is not None}
    assert known == {*METHODS_OF_PEFT, "ln_tuning"}


@pytest.mark.parametrize(("method", "site"), CELLS)
def test_peft_answers_the_same(
    method: str, site: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    name, targets = SITES[site]
    case = peft_oracle.case("generate", name="qalora-vit" if method == "qalora" else name)
    model = create(case, method, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits = saved(model, case, tmp_path)
    report = verified(peft_oracle, case, tmp_path)
    error = report["max_abs_diff"] / float(logits.std())
    record_property("relative_errors", {"strict": error})
    if (method, site) in WRONG_IN_PEFT:
        assert error > 1e-2
    else:
        assert error <= TOLERANCE
        if method != "qalora":
            assert report["from_pretrained_vs_strict"] / float(logits.std()) <= TOLERANCE
    np.testing.assert_allclose(loaded_again(case, tmp_path), logits, atol=TOLERANCE)


@pytest.mark.parametrize("method", sorted(set(METHODS_OF_PEFT) - PACKED))
def test_slices_that_peft_cannot_express(method: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    """Saved under keys of their own, with a warning; PEFT refuses them."""
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    if not METHODS[method].takes_slices:
        with pytest.raises(ValueError, match="slice"):
            create(case, method, ("attn.q", "attn.v"))
        return
    model = create(case, method, ("attn.q", "attn.v"))
    with pytest.warns(UserWarning, match=f"PEFT's format has no {method} adapter of slices"):
        logits = saved(model, case, tmp_path)
    with pytest.raises(OracleError, match=r"not found in the base|No modules were|No layers types"):
        verified(peft_oracle, case, tmp_path)
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)


def test_vera_on_convolutions(peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name="lora-convnext-mlp")
    with pytest.warns(UserWarning, match=r"PEFT's VERA has no adapters for layers such as stem.0"):
        logits = saved(create(case, "vera", ("stem.0", "downsample.1")), case, tmp_path)
    with pytest.raises(OracleError, match=r"No layers types|not supported|Target module"):
        verified(peft_oracle, case, tmp_path)
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)


def test_updates_that_mix_channels(peft_oracle: Oracle, tmp_path: Path) -> None:
    """PEFT's form of an update of depthwise convolutions, there and back."""
    case = peft_oracle.case("generate", name="lora-convnext-depthwise")
    model = create(
        case, "lora", ("stages.0.blocks.0.conv_dw",), lora_rank_pattern={"conv_dw": 16},
        lora_options={"mix_channels": True},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits = saved(model, case, tmp_path)
    report = verified(peft_oracle, case, tmp_path)
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("lora-vit-qkv", ("norm1",)),
        ("lora-vit-qkv", ("^norm$", "blocks.2.norm2")),
        ("lora-convnext-mlp", ("head.norm", "stem.1")),
    ],
)
def test_norms(base: str, targets: tuple[str, ...], peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name=base)
    model = create(case, "ln_tuning", targets)
    logits = saved(model, case, tmp_path)
    report = verified(peft_oracle, case, tmp_path)
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "adalora", "vera", "ia3", "oft"])
def test_head_and_patterns(method: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    more: dict[str, Any] = {"lora_train_classifier": True}
    if method in ("dora", "loha", "lokr"):
        more |= {
            "lora_rank_pattern": {"blocks.1.attn.qkv": 2},
            "lora_alpha_pattern": {"blocks.2.attn.qkv": 3.0},
        }
    model = create(case, method, ("attn.qkv",), **more)
    logits = saved(model, case, tmp_path)
    report = verified(peft_oracle, case, tmp_path)
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    np.testing.assert_allclose(loaded_again(case, tmp_path), logits, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["dora", "adalora", "vera", "oft", "boft"])
@pytest.mark.parametrize("mode", ["lora_only", "all"])
def test_biases(method: str, mode: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    model = create(case, method, ("attn.qkv",), lora_train_bias=mode)
    logits = saved(model, case, tmp_path)
    report = verified(peft_oracle, case, tmp_path)
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    np.testing.assert_allclose(loaded_again(case, tmp_path), logits, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["loha", "lokr", "ia3"])
def test_biases_that_peft_does_not_train(method: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    model = create(case, method, ("mlp.fc1",), lora_train_bias="lora_only")
    with pytest.warns(UserWarning, match=r"trains no biases, so it drops those of this adapter"):
        logits = saved(model, case, tmp_path)
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)


@pytest.mark.parametrize("method", ["bitfit", "linear_probe", "full"])
def test_methods_that_peft_has_not(method: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    model = lora.create_model("test_vit", **base_arguments(case), lora_method=method)
    move_trainable(model)
    with pytest.warns(UserWarning, match=f"PEFT has no method '{method}', so only tfimm_lora"):
        logits = saved(model, case, tmp_path)
    with pytest.raises(OracleError, match="TFIMM_LORA"):
        verified(peft_oracle, case, tmp_path)
    np.testing.assert_array_equal(loaded_again(case, tmp_path), logits)
