"""Combinations of two adapters that PEFT saved, next to what PEFT makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles import Oracle
from tests.parity.adapters import COMBINED, base_model
from tests.parity.compare import load, load_meta, load_tensors, relative_error, timm_weights
from tfimm_lora import lora

HERE = Path(__file__).resolve().parent
TOLERANCE = 2e-5
SAME = [name for name in COMBINED if name != "weighted-linear-rslora"]


@pytest.fixture(scope="module")
def combiner(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """PEFT, combining adapters; its cases are those of ``peft_oracle``."""
    source = shared_dir / "oracle" / "peft_oracle.py"
    env = {**os.environ, "ORACLE_THREADS": "1"}
    script = HERE / "drive_peft_combine.py"
    oracle = Oracle(
        "peft-combine", oracle_python, script, [source], oracle_cache, [str(source)], env
    )
    yield oracle
    oracle.close()


def with_sources(case: Path) -> Any:
    """The case's base model with its two sources, ``a`` and ``b``."""
    first, second = (str(case / folder) for folder in load_meta(case)["weighted"]["adapters"])
    model = lora.load_adapter(base_model(case), first, name="a")
    assert lora.load_adapter(model, second, name="b") is model
    assert lora.adapter_names(model) == ("a", "b") and lora.active_adapters(model) == ("a",)
    return model


def combined(case: Path, **changes: Any) -> Any:
    """The case's base model with our combination of its sources."""
    model = with_sources(case)
    arguments = {k: v for k, v in load_meta(case)["weighted"].items() if k != "adapters"}
    lora.combine_adapters(model, ["a", "b"], name="combo", **{**arguments, **changes})
    lora.set_adapter(model, "combo")
    return model


@pytest.mark.parametrize("name", SAME)
def test_combination(name: str, peft_oracle: Oracle, record_property: Any) -> None:
    case = peft_oracle.case("generate", name=name)
    images, model = load(case, "input"), combined(case)
    errors = {"adapter": relative_error(model(images), load(case, "logits_adapter"))}
    lora.merge_lora_weights(model)
    errors["merged"] = relative_error(model(images), load(case, "logits_merged"))
    lora.unmerge_lora_weights(model)
    ours = timm_weights(lora.convert_to_regular_model(model))
    for key, value in load_tensors(case / "merged.safetensors").items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=4e-6, err_msg=key)
    with lora.disable_adapters(model):
        errors["base"] = relative_error(model(images), load(case, "logits_base"))
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


def updates(weights: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v - base[k] for k, v in weights.items() if np.any(v != base[k])}


def test_rslora_is_combined_without_a_stray_root_of_the_rank(
    peft_oracle: Oracle, record_property: Any
) -> None:
    """PEFT keeps ``use_rslora`` and sets alpha = r, so that its result is sqrt(r) too large."""
    case = peft_oracle.case("generate", name="weighted-linear-rslora")
    meta = load_meta(case)
    sources = [
        load_tensors(case / folder / "adapter_model.safetensors")
        for folder in meta["weighted"]["adapters"]
    ]
    rank, alpha = 4, 8.0
    base = timm_weights(base_model(case))
    ours = updates(timm_weights(lora.convert_to_regular_model(combined(case))), base)
    theirs = updates(load_tensors(case / "merged.safetensors"), base)
    assert ours.keys() == theirs.keys() and ours
    errors, excess = {}, {}
    for key, ours_here in ours.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        a = b = 0.0
        for weight, source in zip(meta["weighted"]["weights"], sources, strict=True):
            scaled = weight * alpha / np.sqrt(rank)
            a = a + np.sign(scaled) * np.sqrt(abs(scaled)) * source[f"{module}.lora_A.weight"]
            b = b + np.sqrt(abs(scaled)) * source[f"{module}.lora_B.weight"]
        intended = b @ a
        errors[key] = float(np.abs(ours_here - intended).max() / np.abs(intended).max())
        excess[key] = float((theirs[key] * intended).sum() / (intended * intended).sum())
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors
    np.testing.assert_allclose(list(excess.values()), np.sqrt(rank), rtol=1e-4)


TYPES: list[dict[str, Any]] = [
    {"combination_type": "ties", "majority_sign_method": "frequency"},
    {"combination_type": "magnitude_prune"},
    {"combination_type": "ties_svd"},
    {"combination_type": "ties_svd", "majority_sign_method": "frequency", "svd_rank": 2},
    {"combination_type": "magnitude_prune_svd", "svd_rank": 6},
    {"combination_type": "svd", "svd_rank": 8},
    {"combination_type": "cat"},
    # Nothing is random where nothing is dropped.
    {"combination_type": "dare_linear", "density": 1.0},
    {"combination_type": "dare_ties", "density": 1.0},
    {"combination_type": "dare_linear_svd", "density": 1.0},
    {"combination_type": "dare_ties_svd", "density": 1.0},
]


@pytest.mark.parametrize("arguments", TYPES, ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("name", ["weighted-linear", "weighted-svd-conv"])
def test_every_type(
    name: str,
    arguments: dict[str, Any],
    peft_oracle: Oracle,
    combiner: Oracle,
    tmp_path: Path,
    record_property: Any,
) -> None:
    case = peft_oracle.case("generate", name=name)
    if not arguments["combination_type"].startswith(("svd", "cat")):
        arguments = {"density": 0.4, **arguments}
    answer = combiner.call("combine", case=str(case), out=str(tmp_path), arguments=arguments)
    theirs = np.load(tmp_path / "logits.npy")
    model = combined(case, **arguments)
    rank = max(layer.adapters["combo"].updates[0].site.rank for layer in lora.lora_layers(model))
    error = relative_error(model(load(case, "input")), theirs)
    record_property("relative_error", error)
    assert (error <= TOLERANCE, rank) == (True, answer["rank"]), (error, rank)


def test_ia3(peft_oracle: Oracle, combiner: Oracle, tmp_path: Path, record_property: Any) -> None:
    """Two adapters of the same layers."""
    case = peft_oracle.case("generate", name="ia3-vit")
    combiner.call("second", case=str(case), out=str(tmp_path), weights=[0.6, 0.7])
    model = lora.load_adapter(base_model(case), str(case / "adapter"), name="a")
    lora.load_adapter(model, str(tmp_path / "second"), name="b")
    lora.combine_adapters(model, ["a", "b"], [0.6, 0.7], "combo")
    lora.set_adapter(model, "combo")
    error = relative_error(model(load(case, "input")), np.load(tmp_path / "logits.npy"))
    record_property("relative_error", error)
    assert error <= TOLERANCE


def test_swapping_honours_patterns(
    peft_oracle: Oracle, combiner: Oracle, tmp_path: Path, record_property: Any
) -> None:
    """An adapter swapped for itself: PEFT takes other scalings where there are patterns."""
    case = peft_oracle.case("generate", name="lora-vit-rank-pattern")
    combiner.call("hotswap", case=str(case), out=str(tmp_path))
    with np.load(tmp_path / "hotswap.npz") as archive:
        theirs = dict(archive)
    images, want = load(case, "input"), load(case, "logits_adapter")
    np.testing.assert_allclose(theirs["before"], want, atol=1e-4)
    assert np.abs(theirs["after"] - want).max() > 0.5
    model = lora.load_adapter(base_model(case), str(case / "adapter"))
    lora.swap_adapter(model, str(case / "adapter"))
    errors = {"itself": relative_error(model(images), want)}
    # And into a model of one rank and one scaling everywhere.
    model = lora.convert_to_lora_model(
        base_model(case), lora_rank=16, lora_alpha=5.0, lora_train_classifier=False
    )
    lora.swap_adapter(model, str(case / "adapter"))
    errors["one scaling"] = relative_error(model(images), want)
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors
