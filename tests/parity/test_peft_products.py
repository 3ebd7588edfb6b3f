"""DoRA, LoHa and LoKr next to PEFT: what it gets wrong, and files that it loads.

What its adapters answer is compared with all others' in ``test_peft_read.py``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.oracles import Oracle
from tests.parity.adapters import (
    PREFIX,
    base_arguments,
    base_model,
    gradients,
    in_peft_layout,
    with_adapter,
)
from tests.parity.compare import (
    load,
    load_meta,
    load_tensors,
    move_trainable,
    relative_error,
    timm_key,
)
from tfimm_lora import lora
from tfimm_lora.lora.methods.lokr import factorization

CASES = [
    "dora-vit",
    "dora-vit-rslora",
    "dora-convnext-conv",
    "dora-convnext-1x1",
    "loha-vit",
    "loha-vit-head-patterns",
    "loha-convnext-conv",
    "loha-convnext-conv-effective",
    "loha-convnext-1x1",
    "lokr-vit",
    "lokr-vit-full",
    "lokr-vit-decompose-both",
    "lokr-vit-factor",
    "lokr-convnext-conv",
    "lokr-convnext-conv-effective",
    "lokr-convnext-1x1",
]
TOLERANCE = 2e-5
EFFECTIVE = "loha-convnext-conv-effective"
# The output factors of LoHa's effective convolution: PEFT's own backward is wrong for these.
WRONG_IN_PEFT = ("hada_w1_a", "hada_w2_a")
each_case = pytest.mark.parametrize("name", CASES)


def test_gradients_of_effective_loha_where_peft_is_wrong(
    peft_oracle: Oracle, record_property: Any
) -> None:
    """Against the closed form, from the gradient of the merged kernel of a model without adapter.

    That the closed form is right shows at the factors for which PEFT is right too.
    """
    case = peft_oracle.case("generate", name=EFFECTIVE)
    theirs = load_tensors(case / "grads.safetensors")
    ours = _peft_gradients(case, theirs)
    adapter = load_tensors(case / "adapter" / "adapter_model.safetensors")
    kernels = _kernel_gradients(case)
    config = load_meta(case)["config"]
    scale = config["alpha"] / config["r"]
    modules = {k.rpartition(".")[0] for k in theirs if ".hada_t1" in k}
    assert modules
    for module in sorted(modules):
        t = {i: _factors(adapter, module, i) for i in "12"}
        kernel = kernels[module.removeprefix(PREFIX)]
        for i, other in ("12", "21"):
            core, a, b = t[i]
            rest = scale * kernel * _product(*t[other])
            exact = {
                "a": np.einsum("prkl,ijkl,jr->ip", rest, core, b),
                "b": np.einsum("prkl,ijkl,ip->jr", rest, core, a),
            }
            key = f"{module}.hada_w{i}_"
            assert _error(theirs[key + "b"], exact["b"]) <= 1e-4
            for end, value in exact.items():
                assert _error(ours[key + end], value) <= 1e-4, key + end
            # Should PEFT mend its backward, test_peft_read.py can have these two as well.
            assert _error(theirs[key + "a"], exact["a"]) > 1e-2, key


@each_case
def test_saved_adapter_loads_in_peft(name: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    case = peft_oracle.case("generate", name=name)
    model = with_adapter(case)
    move_trainable(model)
    _check_in_peft(peft_oracle, case, model, tmp_path)


@pytest.mark.parametrize("method", ["dora", "loha"])
def test_slices_load_in_peft(method: str, peft_oracle: Oracle, tmp_path: Path) -> None:
    """q and v of the fused layer as one adapter of it, with ranks and scales of their own."""
    case = peft_oracle.case("generate", name=f"{method}-vit")
    model = lora.create_model(
        load_meta(case)["timm_name"],
        **base_arguments(case),
        lora_method=method,
        lora_targets=("attn.q", "attn.v"),
        lora_rank=3,
        lora_alpha=5.0,
        lora_rank_pattern={"attn.v": 2},
    )
    move_trainable(model)
    _check_in_peft(peft_oracle, case, model, tmp_path)


def test_dora_with_rslora_and_patterns(peft_oracle: Oracle, tmp_path: Path) -> None:
    """The alpha of a layer is alpha sqrt(r) of its own alpha."""
    case = peft_oracle.case("generate", name="dora-vit-rslora")
    shutil.copytree(case / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["alpha_pattern"] = {"blocks.0.attn.qkv": 3, r"blocks\.[12]\.attn\.qkv": 20}
    path.write_text(json.dumps(config))
    model = lora.load_adapter(base_model(case), str(tmp_path / "adapter"))
    logits = np.asarray(model(load(case, "input"), training=False))
    assert relative_error(logits, load(case, "logits_adapter")) > 1e-2  # the patterns matter
    _verify(peft_oracle, case, tmp_path / "adapter", logits, tmp_path)
    _check_in_peft(peft_oracle, case, model, tmp_path)


@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
def test_initial_values(method: str, peft_oracle: Oracle) -> None:
    """What is zero at first in PEFT is zero here, and the rest fills the same interval."""
    model = lora.create_model("test_vit", lora_method=method, lora_rank=4, lora_targets="attn.proj")
    layer = lora.lora_layers(model)[0]
    values = layer.updates[0].numpy_values()
    zero = {"dora": ("kernel_lora_b", "lora_magnitude_vector"), "loha": ("hada_w2_b",),
            "lokr": ("lokr_w1",)}[method]  # fmt: skip
    assert {n for n, v in values.items() if not np.any(v)} == set(zero)
    for name, value in values.items():
        if name not in zero:
            fan = value.shape[0] if name == "kernel_lora_a" else value.shape[1]
            assert 0.8 / np.sqrt(fan) <= np.abs(value).max() <= 1 / np.sqrt(fan), name


def test_initial_values_as_in_lycoris() -> None:
    model = lora.create_model(
        "test_vit", lora_method="lokr", lora_rank=2, lora_init="lycoris", lora_targets="attn.proj"
    )
    values = lora.lora_layers(model)[0].updates[0].numpy_values()
    assert {n for n, v in values.items() if not np.any(v)} == {"lokr_w2_b"}


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 7, 8, 16, 100])
def test_sides_of_the_kronecker_factors(factor: int) -> None:
    """The rule as PEFT states it: from 1 upwards from divisor to divisor, while they cross not."""

    def walked(size: int) -> tuple[int, int]:
        if factor > 0 and size % factor == 0:
            return factor, size // factor
        m, n = 1, size
        while m < n:
            larger = next(d for d in range(m + 1, size + 1) if size % d == 0)
            if larger + size // larger > 1 + size or larger > (size if factor == -1 else factor):
                break
            m, n = larger, size // larger
        return min(m, n), max(m, n)

    for size in [*range(1, 300), 384, 768, 1152, 2304, 3072]:
        assert factorization(size, factor) == walked(size), size


# --- Helpers -----------------------------------------------------------------------------------


def _check_in_peft(oracle: Oracle, case: Path, model: keras.Model, folder: Path) -> None:
    """What we save has PEFT's keys, and gives in PEFT and here the logits that the model has."""
    logits = np.asarray(model(load(case, "input"), training=False))
    assert relative_error(logits, load(case, "logits_base")) > 1e-2
    lora.save_adapter(model, folder / "saved")
    _verify(oracle, case, folder / "saved", logits, folder)
    again = lora.load_adapter(base_model(case), folder / "saved")
    assert relative_error(again(load(case, "input"), training=False), logits) <= 1e-5


def _verify(oracle: Oracle, case: Path, adapter: Path, logits: np.ndarray, folder: Path) -> None:
    np.save(folder / "logits.npy", logits)
    report = oracle.call(
        "verify", case=str(case), adapter=str(adapter), logits=str(folder / "logits.npy")
    )
    assert report["ok"], report


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3))


def _peft_gradients(case: Path, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our gradients by PEFT's names, in PEFT's layouts."""
    model = with_adapter(case)
    found = gradients(model, load(case, "input"), load(case, "grad_probe"))
    ours = {}
    for path, value in found.items():
        key = PREFIX + timm_key(path)
        key = key.replace("kernel_lora_a", "lora_A.weight").replace(
            "kernel_lora_b", "lora_B.weight"
        )
        # LoHa and LoKr have PEFT's shapes.
        same = ".hada_" in key or ".lokr_" in key
        ours[key] = value if same else in_peft_layout(key, value, theirs[key].shape)
    assert sorted(ours) == sorted(theirs)
    return ours


def _kernel_gradients(case: Path) -> dict[str, np.ndarray]:
    """Gradients of the merged kernels of a model without adapter, in torch's layout, by module."""
    model = lora.convert_to_regular_model(with_adapter(case))
    found = gradients(model, load(case, "input"), load(case, "grad_probe"))
    by_key = {timm_key(path): value for path, value in found.items()}
    return {
        key.removesuffix(".weight"): (
            value.transpose(2, 3, 0, 1) if "conv_dw" in key else value.transpose(3, 2, 0, 1)
        ).astype("float64")
        for key, value in by_key.items()
        if value.ndim == 4
    }


def _factors(adapter: dict[str, np.ndarray], module: str, i: str) -> tuple[np.ndarray, ...]:
    names = (f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")
    return tuple(adapter[f"{module}.{n}"].astype("float64") for n in names)


def _product(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)
