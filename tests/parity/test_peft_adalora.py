"""AdaLoRA's rank allocation against PEFT's, step by step, and pruned adapters for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.oracles import Oracle
from tests.parity.adapters import base_arguments
from tests.parity.compare import load, load_meta, timm_key
from tfimm_lora import lora
from tfimm_lora.lora.optimizer_hooks import hooks_of

TENSORS = {"kernel_lora_a": "lora_A", "kernel_lora_b": "lora_B", "kernel_lora_e": "lora_E"}


def peft_name(path: str) -> str:
    module, _, leaf = timm_key(path).rpartition(".")
    return f"{module}.{TENSORS[leaf]}.default"


def to_keras(name: str, value: np.ndarray) -> np.ndarray:
    return value[:, 0] if "lora_E" in name else value.T


def to_peft(name: str, value: np.ndarray) -> np.ndarray:
    return value[:, None] if "lora_E" in name else value.T


def test_same_masks_and_ranks_at_every_step(peft_oracle: Oracle, record_property: Any) -> None:
    """The hook of the optimizer, as in fit; at a learning rate of zero only masks change E."""
    folder = peft_oracle.case("adalora_trace")
    info = json.loads((folder / "trace.json").read_text())
    trace = np.load(folder / "trace.npz")
    config = info["config"]
    model = lora.create_model(
        "test_vit", input_size=(48, 48), nb_classes=7, lora_train_classifier=False,
        lora_method="adalora", lora_targets=["attn.qkv"], lora_rank=config["init_r"], lora_alpha=8,
        lora_options={
            "target_rank": config["target_r"], "tinit": config["tinit"],
            "tfinal": config["tfinal"], "delta_t": config["deltaT"], "beta1": config["beta1"],
            "beta2": config["beta2"], "total_step": config["total_step"],
        },
    )  # fmt: skip
    variables = model.trainable_variables
    names = {v.path: peft_name(v.path) for v in variables}
    assert sorted(names.values()) == sorted(k[5:] for k in trace.files if k.startswith("init/"))
    for v in variables:
        v.assign(to_keras(names[v.path], trace[f"init/{names[v.path]}"]))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    allocator = None
    worst = np.inf
    for entry in info["log"]:
        step = entry["step"]
        found = [to_keras(n, trace[f"grad/{step}/{n}"]) for n in names.values()]
        model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in found], variables)
        allocator = hooks_of(model.optimizer).allocators[0]
        kept = 0
        for v in variables:
            name = names[v.path]
            if "lora_E" in name:
                value, wanted = np.asarray(v), trace[f"E/{step}/{name}"][:, 0]
                assert np.array_equal(value != 0, wanted != 0), (step, name)
                assert np.array_equal(value, wanted)
                kept += np.count_nonzero(value)
        assert kept == entry["kept"], step
        if step == config["total_step"] - config["tfinal"] - 1:
            # The last step in which importance is measured.
            worst = max(_state_error(model, allocator, names, trace))
    assert allocator is not None and allocator.step == 20
    pattern = {k.removesuffix(".default"): v for k, v in info["rank_pattern"].items()}
    ours = dict(zip([n for n in names.values() if "lora_E" in n], allocator.masks(), strict=True))
    assert len(pattern) == len(ours) == 6
    for name, mask in ours.items():
        assert [bool(m) for m in mask] == pattern[name.removesuffix(".default")], name
    record_property("relative_errors", {"importance and uncertainty": worst})
    assert worst <= 1e-6


def _state_error(model: Any, allocator: Any, names: dict[str, str], trace: Any) -> list[float]:
    by_name = {v.path.rpartition("/")[2]: v for v in model.optimizer.variables}
    errors = []
    for path, name in names.items():
        for kind, end in (("ipt", "importance"), ("unc", "uncertainty")):
            own = np.asarray(by_name[f"{path.replace('/', '_')}_adalora_{end}"])
            want = trace[f"{kind}/{name}"]
            errors.append(float(np.abs(to_peft(name, own) - want).max() / np.abs(want).max()))
    return errors


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("adalora-vit", ["attn.qkv", "attn.proj"]),
        ("adalora-vit", ["attn.q", "attn.v"]),
        ("adalora-convnext-conv", ["stem.0", "downsample.1", "mlp.fc1"]),
    ],
    ids=["whole", "slices", "convolutions"],
)
def test_peft_loads_what_training_has_pruned(
    base: str, targets: list[str], peft_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    case = peft_oracle.case("generate", name=base)
    model = lora.create_model(
        load_meta(case)["timm_name"], **base_arguments(case), lora_method="adalora", lora_rank=4,
        lora_alpha=8, lora_targets=targets, lora_train_classifier=False,
        lora_options={"tinit": 1, "tfinal": 1, "target_rank": 2},
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.03), loss)
    images = load(case, "input")
    model.fit(images, np.arange(len(images)), epochs=6, verbose=0)
    updates = [u for layer in lora.lora_layers(model) for u in layer.updates]
    assert sum(int(u.kept().sum()) for u in updates) == 2 * len(updates)
    logits = np.asarray(model(images, training=False))
    assert np.abs(logits - load(case, "logits_base")).max() > 0.01, "the adapter says nothing"
    np.save(tmp_path / "logits.npy", logits)
    folder = lora.save_adapter(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["total_step"] == 6 and config["rank_pattern"]
    report = peft_oracle.call(
        "verify", case=str(case), adapter=str(folder), logits=str(tmp_path / "logits.npy")
    )
    for problem in ("missing_in_file", "unexpected_in_file", "peft_unexpected"):
        assert not report[problem], (problem, report[problem])
    assert not report["from_pretrained_warnings"]
    errors = {
        "strict": report["max_abs_diff"] / float(logits.std()),
        "from_pretrained": report["from_pretrained_vs_strict"] / float(logits.std()),
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) <= 2e-5, errors
