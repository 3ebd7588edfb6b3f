"""Adapters that PEFT saved, loaded by us: logits, merged weights and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.oracles import Oracle
from tests.parity.adapters import (
    COMBINED,
    PLAIN,
    base_model,
    gradients,
    in_peft_layout,
    peft_names,
    with_adapter,
)
from tests.parity.compare import load, load_meta, load_tensors, relative_error, timm_weights
from tfimm_lora import lora

TOLERANCE = 2e-5

REFUSED = [
    "lora-vit-lora-bias",  # a bias of the update
    "lora-convnext-conv-bias",
    "lora-convnext-depthwise",  # PEFT's update of a depthwise kernel mixes channels
    "lora-vit-pissa",  # the base weights are rewritten when the adapter is loaded
    "lora-vit-pissa-niter",
    "lora-vit-olora",
    "dora-vit",
    "loha-vit",
    "lokr-vit",
    "adalora-vit",
    "vera-vit",
    "ia3-vit",
    "oft-vit",
    "qalora-vit",
]


@pytest.mark.parametrize("name", PLAIN + COMBINED)
def test_logits(name: str, peft_oracle: Oracle, record_property: Any) -> None:
    case = peft_oracle.case("generate", name=name)
    images = load(case, "input")
    errors = {"base": relative_error(base_model(case)(images), load(case, "logits_base"))}
    model = with_adapter(case)
    errors["adapter"] = relative_error(model(images), load(case, "logits_adapter"))
    regular = lora.convert_to_regular_model(model)
    errors["regular"] = relative_error(regular(images), load(case, "logits_merged"))
    lora.merge_lora_weights(model)
    errors["merged"] = relative_error(model(images), load(case, "logits_merged"))
    lora.unmerge_lora_weights(model)
    errors["unmerged"] = relative_error(model(images), load(case, "logits_adapter"))
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", PLAIN + COMBINED)
def test_merged_weights(name: str, peft_oracle: Oracle) -> None:
    case = peft_oracle.case("generate", name=name)
    ours = timm_weights(lora.convert_to_regular_model(with_adapter(case)))
    theirs = load_tensors(case / "merged.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", PLAIN)
def test_gradients(name: str, peft_oracle: Oracle, record_property: Any) -> None:
    """Of sum(logits * probe), for every weight that PEFT trains, and no other weight trains."""
    case = peft_oracle.case("generate", name=name)
    theirs = load_tensors(case / "grads.safetensors")
    model = with_adapter(case)
    ours = gradients(model, load(case, "input"), load(case, "grad_probe"))
    names = peft_names(model, load_meta(case)["config"])
    if name == "lora-vit-mica":  # PEFT freezes B there; an adapter that is loaded here is plain
        names = {k: v for k, v in names.items() if "lora_B" not in k}
    assert sorted(names) == sorted(theirs)
    errors = {}
    for key, variable in names.items():
        want = theirs[key]
        got = in_peft_layout(key, ours[variable.path], want.shape)
        errors[key] = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-3))
    worst = max(errors, key=errors.get)
    record_property("relative_errors", {worst: errors[worst]})
    assert errors[worst] <= 1e-4, (worst, errors[worst])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_is_refused(name: str, peft_oracle: Oracle) -> None:
    """Never loaded with another meaning: the message says what the adapter is."""
    case = peft_oracle.case("generate", name=name)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        with_adapter(case)
    config = json.loads((case / "adapter" / "adapter_config.json").read_text())
    said = str(caught.value).lower()
    told = {
        "lora-vit-lora-bias": "lora_bias",
        "lora-convnext-conv-bias": "lora_bias",
        "lora-convnext-depthwise": "depthwise",
        "dora-vit": "dora",
        "qalora-vit": "qalora",
    }.get(name, str(config.get("init_lora_weights", "")).lower())
    if config["peft_type"] != "LORA":
        told = config["peft_type"].lower()
    assert told in said, said


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shortest_config(dtype: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    """What older versions wrote: few fields, and factors in half precision."""
    case = peft_oracle.case("generate", name="lora-vit-qkv")
    factors = load_tensors(case / "adapter" / "adapter_model.safetensors")
    factors = {key: value.astype(dtype) for key, value in factors.items()}
    save_file(factors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ["qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "of_the_future": 1}))
    model = lora.load_adapter(base_model(case), str(tmp_path))
    logits = np.asarray(model(load(case, "input"), training=False))
    np.save(tmp_path / "logits.npy", logits)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = peft_oracle.call(
        "verify", case=str(case), adapter=str(tmp_path), logits=str(tmp_path / "logits.npy")
    )
    assert report["max_abs_diff"] / float(logits.std()) <= TOLERANCE
    assert not report["missing_in_file"] and not report["unexpected_in_file"]
