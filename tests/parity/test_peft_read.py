"""Adapters that PEFT saved, loaded by us: logits, merged weights and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.oracles import Oracle
from tests.parity.adapters import PREFIX, base_model, with_adapter
from tests.parity.compare import (
    load,
    load_meta,
    load_tensors,
    relative_error,
    scaled_error,
    timm_weights,
)
from tests.parity.peft_cases import (
    ALL,
    COMBINED,
    RANDOM_START,
    UNMERGED,
    WRONG_IN_PEFT,
    loaded,
)
from tests.parity.peft_gradients import peft_gradients
from tfimm_lora import lora

TOLERANCE = 2e-5
GRADIENTS = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:.*the adapter has .* weights where the kernel")


def test_every_case_of_the_oracle_is_here(peft_oracle: Oracle) -> None:
    assert sorted(peft_oracle.call("names")) == sorted(ALL)
    assert len(ALL) == 68


@pytest.mark.parametrize("name", ALL)
def test_logits_and_merged_weights(
    name: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    case = peft_oracle.case("generate", name=name)
    images = load(case, "input")
    errors = {"base": relative_error(base_model(case)(images), load(case, "logits_base"))}
    model = loaded(case, name, tmp_path)
    wanted = load(case, "logits_adapter")
    errors["adapter"] = relative_error(model(images), wanted)
    if name == "lora-convnext-depthwise":
        for function in (lora.convert_to_regular_model, lora.merge_lora_weights):
            with pytest.raises(ValueError, match="mixes the channels of different groups"):
                function(model)
        errors["unmerged"] = relative_error(model(images), wanted)
    else:
        regular = lora.convert_to_regular_model(model)
        merged = wanted if name in UNMERGED else load(case, "logits_merged")
        errors["regular"] = relative_error(regular(images), merged)
        if name not in UNMERGED:
            ours = timm_weights(regular)
            theirs = load_tensors(case / "merged.safetensors")
            assert sorted(ours) == sorted(theirs)
            errors["weights"] = max(scaled_error(ours[k], theirs[k]) for k in theirs)
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(
    "name", ["lora-vit-lora-bias", "dora-vit", "lokr-vit", "ia3-vit", "oft-vit-neumann"]
)
def test_merged_and_unmerged_again(name: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name=name)
    images, model = load(case, "input"), loaded(case, name, tmp_path)
    lora.merge_lora_weights(model)
    assert relative_error(model(images), load(case, "logits_merged")) <= TOLERANCE
    lora.unmerge_lora_weights(model)
    assert relative_error(model(images), load(case, "logits_adapter")) <= TOLERANCE


@pytest.mark.parametrize("name", [n for n in ALL if n not in {*COMBINED, RANDOM_START}])
def test_gradients(name: str, peft_oracle: Oracle, tmp_path: Path, record_property: Any) -> None:
    """Of sum(logits * probe), for every weight that PEFT trains, and no other weight trains."""
    case = peft_oracle.case("generate", name=name)
    theirs = load_tensors(case / "grads.safetensors")
    model = loaded(case, name, tmp_path)
    ours = peft_gradients(model, load(case, "input"), load(case, "grad_probe"))
    if name == "lora-vit-mica":  # PEFT freezes B there; an adapter that is loaded here is plain
        ours = {k: v for k, v in ours.items() if "lora_B" not in k}
    if name.startswith("ln-tuning"):
        ours = {_as_norm(k, theirs): v for k, v in ours.items()}
    # A gradient that is zero, as that of the key's bias nearly is, may be missing.
    assert set(ours) <= set(theirs)
    assert all(np.abs(theirs[k]).max() < 1e-6 for k in set(theirs) - set(ours))
    errors, wrong = {}, {}
    for key, value in ours.items():
        want = theirs[key]
        if name == "adalora-vit-pruned":
            want = _cropped(key, want, load_meta(case)["config"]["rank_pattern"])
        got = value[tuple(slice(0, n) for n in want.shape)] if value.ndim == want.ndim else value
        error = float(np.abs(got.reshape(want.shape) - want).max() / max(np.abs(want).max(), 1e-3))
        known_wrong = key.endswith(WRONG_IN_PEFT.get(name, ("-",)))
        (wrong if known_wrong else errors)[key] = error
    worst = max(errors, key=errors.__getitem__)
    record_property("relative_errors", {worst: errors[worst]})
    assert errors[worst] <= GRADIENTS, (worst, errors[worst])
    assert all(error > 1e-2 for error in wrong.values()), wrong
    assert bool(wrong) == (name in WRONG_IN_PEFT)


def _cropped(key: str, value: np.ndarray, masks: dict[str, list[bool]]) -> np.ndarray:
    """PEFT's gradient for the ranks that are left, which alone are in the file."""
    module = key.removeprefix(PREFIX).rpartition(".")[0]
    kept = np.array(masks[f"{module}.lora_E"])
    return value[:, kept] if key.endswith("lora_B") else value[kept]


def _as_norm(key: str, theirs: Any) -> str:
    module, _, leaf = key.rpartition(".")
    tuned = f"{module}.ln_tuning_layers.{leaf}"
    return tuned if tuned in theirs else key


def test_what_was_random_is_refused(peft_oracle: Oracle) -> None:
    """Never loaded with another meaning: the message says what the adapter is, and what to do."""
    case = peft_oracle.case("generate", name=RANDOM_START)
    with pytest.raises(ValueError, match=r"pissa_niter_4.*path_initial_model_for_weight_conver"):
        with_adapter(case)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shortest_config(dtype: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    """What older versions wrote: few fields, and factors in half precision."""
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    factors = load_tensors(case / "adapter" / "adapter_model.safetensors")
    factors = {key: value.astype(dtype) for key, value in factors.items()}
    save_file(factors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ["qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "of_the_future": 1}))
    with pytest.warns(UserWarning, match="'of_the_future' is unknown and ignored"):
        model = lora.load_adapter(base_model(case), str(tmp_path))
    logits = np.asarray(model(load(case, "input"), training=False))
    np.save(tmp_path / "logits.npy", logits)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = peft_oracle.call(
        "verify", case=str(case), adapter=str(tmp_path), logits=str(tmp_path / "logits.npy")
    )
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    assert not report["missing_in_file"] and not report["unexpected_in_file"]


def test_targets_that_lack_tensors(peft_oracle: Oracle, tmp_path: Path) -> None:
    """PEFT warns and answers with a part of the adapter; here the message names both sides."""
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    factors = load_tensors(case / "adapter" / "adapter_model.safetensors")
    left = {k: v for k, v in factors.items() if not k.startswith(f"{PREFIX}blocks.3.")}
    config = json.loads((case / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(left, tmp_path / "adapter_model.safetensors")
    message = r"target_modules also mean blocks.3.attn.qkv, which the file has no tensors for"
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(base_model(case), str(tmp_path))
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config["exclude_modules"] = ["blocks.3.attn.qkv"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has tensors for blocks.3.attn.qkv, which is not target"):
        lora.load_adapter(base_model(case), str(tmp_path))
    # Without targets the tensors say which modules are adapted.
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": None, "exclude_modules": None})
    )
    model = lora.load_adapter(base_model(case), str(tmp_path))
    error = relative_error(model(load(case, "input")), load(case, "logits_adapter"))
    assert error <= TOLERANCE
