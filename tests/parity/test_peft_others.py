"""IA3, OFT, BOFT, LN tuning and initialisations that PEFT rewrites the base model with.

What their adapters answer is compared with all others' in ``test_peft_read.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

import tfimm_lora
from tests.oracles import Oracle, OracleError
from tests.parity.adapters import base_arguments, base_model, with_adapter
from tests.parity.compare import (
    load,
    load_meta,
    load_tensors,
    move_trainable,
    relative_error,
    timm_key,
)
from tfimm_lora import lora

TOLERANCE = 2e-5

ROTATIONS = ["oft-vit", "oft-vit-neumann", "oft-vit-share", "oft-convnext-1x1", "boft-vit"]
CASES = [
    "ia3-vit",
    "ia3-convnext-conv",
    *ROTATIONS,
    "ln-tuning-vit",
    "ln-tuning-convnext",
    "lora-vit-pissa",
    "lora-vit-olora",
    "lora-vit-orthogonal",
    "lora-vit-mica",
]
REWRITTEN = ["lora-vit-pissa", "lora-vit-olora"]


@pytest.mark.parametrize("name", REWRITTEN)
def test_without_the_adapter_the_base_model_is_back(name: str, peft_oracle: Oracle) -> None:
    """PEFT's ``disable_adapter`` leaves the rewritten base model, whose logits are others."""
    case = peft_oracle.case("generate", name=name)
    assert load_meta(case)["disabled_diff"] > 0.5
    images, model = load(case, "input"), with_adapter(case)
    with lora.disable_adapters(model):
        logits = np.asarray(model(images))
    np.testing.assert_array_equal(logits, np.asarray(base_model(case)(images)))


@pytest.mark.parametrize("name", ["lora-vit-pissa-niter", *REWRITTEN])
def test_rewritten_base(name: str, peft_oracle: Oracle) -> None:
    """On the base weights that PEFT left, the adapter is plain LoRA."""
    case = peft_oracle.case("generate", name=name)
    arguments = base_arguments(case) | {"model_path": str(case / "base_mutated.safetensors")}
    base = tfimm_lora.create_model(load_meta(case)["timm_name"], **arguments)
    model = lora.load_adapter(base, str(case / "adapter"), rewritten_base=True)
    assert relative_error(model(load(case, "input")), load(case, "logits_adapter")) <= TOLERANCE


def test_random_initialisation_is_refused(peft_oracle: Oracle) -> None:
    case = peft_oracle.case("generate", name="lora-vit-pissa-niter")
    with pytest.raises(ValueError, match=r"pissa_niter_4.*rewritten_base=True"):
        with_adapter(case)
    plain = peft_oracle.case("generate", name="lora-vit-qkv")
    with pytest.raises(ValueError, match="Leave rewritten_base out"):
        lora.load_adapter(base_model(plain), str(plain / "adapter"), rewritten_base=True)


def test_first_factors_do_not_go_into_a_plain_model(peft_oracle: Oracle) -> None:
    """Neither a PEFT adapter of a rewritten base into plain LoRA, nor the other way round."""
    pissa = peft_oracle.case("generate", name="lora-vit-pissa")
    targets = ["attn.qkv", "attn.proj"]
    model = lora.convert_to_lora_model(
        base_model(pissa), lora_rank=4, lora_alpha=8, lora_targets=targets
    )
    with pytest.raises(ValueError, match="lora_init='pissa'"):
        lora.load_adapter(model, str(pissa / "adapter"))
    plain = peft_oracle.case("generate", name="lora-vit-qkv")
    model = lora.convert_to_lora_model(
        base_model(plain), lora_rank=4, lora_alpha=8, lora_targets="attn.qkv", lora_init="pissa"
    )
    with pytest.raises(ValueError, match="lora_init=None"):
        lora.load_adapter(model, str(plain / "adapter"))


_VIT, _CONVNEXT, _CONVMLP = "lora-vit-qkv", "lora-convnext-mlp", "lora-convnext-conv1x1"
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": (_VIT, {"lora_method": "ia3", "lora_targets": "attn.qkv mlp.fc1"}),
    "ia3-feedforward": (
        _VIT,
        {
            "lora_method": "ia3",
            "lora_targets": "attn.q attn.v mlp.fc1 mlp.fc2",
            "lora_options": {"feedforward": "mlp.fc2"},
            "lora_train_classifier": True,
        },
    ),
    "ia3-conv": (
        _CONVNEXT,
        {
            "lora_method": "ia3",
            "lora_targets": "stem.0 downsample.1 conv_dw",
            "lora_options": {"feedforward": ["stem.0", "conv_dw"]},
        },
    ),
    "oft": (_VIT, {"lora_method": "oft", "lora_targets": "attn.qkv mlp.fc2"}),
    "oft-exact": (
        _VIT,
        {
            "lora_method": "oft",
            "lora_targets": "attn.qkv",
            "lora_options": {"blocks": 4, "block_share": True, "cayley_neumann": False},
            "lora_train_bias": "lora_only",
        },
    ),
    "oft-1x1": (_CONVMLP, {"lora_method": "oft", "lora_options": {"block_size": 9}}),
    "boft": (_VIT, {"lora_method": "boft", "lora_targets": "attn.qkv", "lora_train_bias": "all"}),
    "boft-conv": (_CONVNEXT, {"lora_method": "boft", "lora_targets": "stem.0 downsample.1"}),
    "ln": (_VIT, {"lora_method": "ln_tuning"}),
    "ln-targets": (
        _CONVNEXT,
        {
            "lora_method": "ln_tuning",
            "lora_targets": "head.norm stages.2.*",
            "lora_train_classifier": True,
        },
    ),
    "pissa": (_VIT, {"lora_init": "pissa", "lora_alpha": 6, "lora_rank_pattern": {"mlp.fc2": 2}}),
    "pissa-niter": (_VIT, {"lora_init": "pissa_niter_2", "lora_method": "rslora", "lora_alpha": 3}),
    "pissa-slices": (_VIT, {"lora_init": "pissa", "lora_targets": "attn.q attn.v"}),
    "olora": (_CONVNEXT, {"lora_init": "olora", "lora_targets": "stem.0 downsample.1 mlp.fc1"}),
    "orthogonal": (_VIT, {"lora_init": "orthogonal"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_peft_answers_the_same(
    name: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    base, options = SAVED[name]
    case = peft_oracle.case("generate", name=base)
    model = lora.create_model(load_meta(case)["timm_name"], **base_arguments(case), **options)
    move_trainable(model)
    for variable in model.trainable_variables:
        if variable.name == "oft_r":  # far from zero, the series is no rotation
            variable.assign(0.3 * np.asarray(variable))
    logits = np.asarray(model(load(case, "input"), training=False))
    assert np.abs(logits - load(case, "logits_base")).max() > 0.01, "the adapter says nothing"
    np.save(tmp_path / "logits.npy", logits)
    lora.save_adapter(model, tmp_path / "adapter")
    report = peft_oracle.call(
        "verify",
        case=str(case),
        adapter=str(tmp_path / "adapter"),
        logits=str(tmp_path / "logits.npy"),
    )
    for problem in ("missing_in_file", "unexpected_in_file", "from_pretrained_warnings"):
        assert not report[problem], (problem, report[problem])
    errors = {
        "strict": report["max_abs_diff"] / float(logits.std()),
        "from_pretrained": report["from_pretrained_vs_strict"] / float(logits.std()),
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors
    again = lora.load_adapter(base_model(case), tmp_path / "adapter")
    np.testing.assert_array_equal(np.asarray(again(load(case, "input"), training=False)), logits)
    # Without what this package records in the file, as if PEFT had written it.
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", bare)
    tensors = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(tensors, bare / "adapter_model.safetensors", {"format": "pt"})
    again = lora.load_adapter(base_model(case), bare)
    assert relative_error(again(load(case, "input"), training=False), logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["bitfit", "linear_probe", "full"])
def test_peft_refuses_what_it_has_not(name: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name=_VIT)
    model = lora.convert_to_lora_model(base_model(case), lora_method=name)
    with pytest.warns(UserWarning, match="PEFT has no method"):
        lora.save_adapter(model, tmp_path)
    with pytest.raises(OracleError, match="TFIMM_LORA"):
        peft_oracle.call(
            "verify", case=str(case), adapter=str(tmp_path), logits=str(case / "logits_base.npy")
        )


ROTATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "oft-exact": (
        "OFT",
        {"block_size": 9, "cayley_neumann": False},
        {"oft_block_size": 9, "r": 0, "use_cayley_neumann": False},
    ),
    "oft-three-terms": (
        "OFT",
        {"blocks": 6, "num_cayley_neumann_terms": 3},
        {"r": 6, "oft_block_size": 0, "num_cayley_neumann_terms": 3},
    ),
    "boft": ("BOFT", {"block_size": 9}, {"boft_block_size": 9}),
    "boft-2": (
        "BOFT",
        {"block_size": 4, "n_butterfly_factor": 2},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    ),
    "boft-3": (
        "BOFT",
        {"block_size": 2, "n_butterfly_factor": 3},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
    ),
    "boft-3-of-12-blocks": (
        "BOFT",
        {"blocks": 12, "n_butterfly_factor": 3},
        {"boft_block_size": 0, "boft_block_num": 12, "boft_n_butterfly_factor": 3},
    ),
}


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_rotated_layers(
    layer: str, name: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    """One layer, with butterflies of several factors, and overlapping windows of a convolution.

    PEFT's OFT of such a convolution answers something else unmerged than merged. Ours is what PEFT
    merges.
    """
    kind, options, config = ROTATED[name]
    rng = np.random.default_rng(0)
    if layer == "linear":
        ours: Any = keras.layers.Dense(10, name="0")
        inputs = rng.standard_normal((3, 72)).astype("float32")
    else:
        ours = keras.layers.Conv2D(10, 3, name="0")
        inputs = rng.standard_normal((2, 7, 6, 8)).astype("float32")
    adapted = lora.convert_to_lora_layer(ours, lora_method=kind.lower(), lora_options=options)
    adapted.build(inputs.shape)
    for weight in adapted.weights:
        start = 1.0 if weight.name == "boft_s" else 0.0
        weight.assign(start + 0.2 * rng.standard_normal(weight.shape))
    tensors = {f"adapter.{k}": v for k, v in adapted.updates[0].to_peft().items()}
    kernel = np.asarray(adapted.kernel)
    kernel = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
    np.savez(tmp_path / "weights.npz", weight=kernel, bias=np.asarray(adapted.bias), **tensors)
    np.save(tmp_path / "inputs.npy", inputs)
    peft_oracle.call(
        "adapted_layer",
        out=str(tmp_path / "answer.npz"),
        weights=str(tmp_path / "weights.npz"),
        inputs=str(tmp_path / "inputs.npy"),
        kind=kind,
        config=config,
    )
    with np.load(tmp_path / "answer.npz") as archive:
        theirs = dict(archive)
    found = relative_error(adapted(inputs), theirs["merged"])
    record_property("relative_errors", {"adapter": found})
    assert found <= TOLERANCE, found
    apart = float(np.abs(theirs["adapter"] - theirs["merged"]).max() / theirs["merged"].std())
    if kind == "OFT" and layer == "convolution":
        assert apart > 0.5, "PEFT's unmerged OFT of convolutions is right now; compare with it"
    else:
        assert apart <= TOLERANCE
    adapted.merge_weights()
    assert relative_error(adapted(inputs), theirs["merged"]) <= TOLERANCE


def test_eva(peft_oracle: Oracle, tmp_path: Path) -> None:
    """The components of the layers' inputs are those that PEFT finds, up to its approximation."""
    case = peft_oracle.case("generate", name=_VIT)
    images = np.random.default_rng(0).standard_normal((32, 48, 48, 3)).astype("float32")
    images += 2 * np.random.default_rng(1).standard_normal((32, 1, 1, 3)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    model = lora.convert_to_lora_model(
        base_model(case), lora_init="eva", lora_rank=4, lora_targets="attn.qkv mlp.fc2"
    )
    lora.initialize_eva(model, images)
    for rho in (1.0, 2.0):
        peft_oracle.call(
            "eva",
            case=str(case),
            out=str(tmp_path / f"{rho}.npz"),
            images=str(tmp_path / "images.npy"),
            r=4,
            rho=rho,
            target_modules=["qkv", "fc2"],
        )
    with np.load(tmp_path / "1.0.npz") as archive:
        theirs = dict(archive)
    overlaps = []
    for variable in model.trainable_variables:
        if variable.name != "kernel_lora_a":
            continue
        found = np.asarray(variable).T
        wanted = theirs[timm_key(variable.path).rpartition(".")[0]]
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
        # Cosines of the angles between the two subspaces.
        overlaps.append(np.linalg.svd(found @ wanted.T)[1].min())
    assert len(overlaps) == len(theirs) == 12
    assert np.median(overlaps) > 0.99 and min(overlaps) > 0.9, overlaps
    model = lora.convert_to_lora_model(
        base_model(case), lora_init="eva", lora_rank=4, lora_targets="attn.qkv mlp.fc2"
    )
    model = lora.initialize_eva(model, images, rho=2.0)
    ranks = {
        timm_key(la.path + "/x").rpartition(".")[0]: la.lora_rank for la in lora.lora_layers(model)
    }
    with np.load(tmp_path / "2.0.npz") as archive:
        wanted_ranks = {k: len(v) for k, v in archive.items() if len(v)}
    assert sum(ranks.values()) == sum(wanted_ranks.values()) == 48
    moved = sum(abs(ranks.get(k, 0) - wanted_ranks.get(k, 0)) for k in {*ranks, *wanted_ranks})
    assert moved <= 4, (ranks, wanted_ranks)
