"""``LoRAConv2D`` next to PEFT's convolution: overlapping kernels, strides and groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles import Oracle
from tests.parity.compare import relative_error
from tfimm_lora import lora

TOLERANCE = 2e-5


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), ((5, 3), 1), (4, 4)]
)
def test_convolution(
    kernel_size: Any,
    stride: int,
    groups: int,
    method: str,
    peft_oracle: Oracle,
    tmp_path: Path,
    record_property: Any,
) -> None:
    rank, alpha = 4, 6.0
    layer = lora.LoRAConv2D(
        12,
        kernel_size,
        strides=stride,
        groups=groups,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_method=method,
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 13, 11, 8)).astype("float32")
    layer.build(images.shape)
    for weight in layer.weights:
        weight.assign(0.3 * rng.standard_normal(weight.shape))
    kernel, bias, a, b = (np.asarray(w) for w in (layer.kernel, layer.bias, *layer.lora_weights))
    # Ours: A (h, w, in / groups, r), B (r / groups, out). PEFT's A reads all input channels.
    dense_a = np.zeros((rank, 8, *kernel.shape[:2]), "float32")
    for g in range(groups):
        ranks = slice(g * rank // groups, (g + 1) * rank // groups)
        channels = slice(g * 8 // groups, (g + 1) * 8 // groups)
        dense_a[ranks, channels] = a.transpose(3, 2, 0, 1)[ranks]
    np.savez(
        tmp_path / "weights.npz",
        weight=kernel.transpose(3, 2, 0, 1),
        bias=bias,
        lora_A=dense_a,
        lora_B=b.T[:, :, None, None],
    )
    np.save(tmp_path / "images.npy", images)
    answer = peft_oracle.call(
        "convolution",
        out=str(tmp_path / "answer.npz"),
        weights=str(tmp_path / "weights.npz"),
        inputs=str(tmp_path / "images.npy"),
        bias=True,
        stride=stride,
        groups=groups,
        r=rank,
        lora_alpha=alpha,
        use_rslora=method == "rslora",
    )
    assert not answer["unexpected"]
    with np.load(tmp_path / "answer.npz") as archive:
        theirs = dict(archive)
    errors = {"adapter": relative_error(layer(images), theirs["adapter"])}
    layer.merge_weights()
    # PEFT cannot merge into a grouped kernel; ours is one, so merging must change nothing.
    errors["merged"] = relative_error(layer(images), theirs.get("merged", theirs["adapter"]))
    if "kernel" in theirs:
        errors["kernel"] = relative_error(layer.kernel, theirs["kernel"])
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors
