"""Checkpoints in the names of others answer as timm's own loader makes them answer.

The weights are random and far from their start, written in the published layouts by
``foreign_layouts.py``; timm's filter, not ours, says what they mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import (
    TIMM_TOLERANCE,
    load,
    load_tensors,
    relative_error,
    timm_weights,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: a layout, a small model, the grid of its images and of ours."""

    layout: str
    arch: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: tuple[int, int] = (48, 48)
    new_size: tuple[int, int] | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = [self.layout, self.arch, *(f"{k}={v}" for k, v in self.overrides.items())]
        parts += [f"to{self.new_size[0]}x{self.new_size[1]}"] if self.new_size else []
        return "-".join([*parts, *([self.dtype] if self.dtype != "float32" else [])])


TWO = {"depth": 2}
FEW = {"depths": [1, 1, 2, 1]}
SWIGLU = {"depth": 2, "embed_dim": 96, "num_heads": 3}
CASES = [
    Case("openai_clip", "vit_xsmall_patch16_clip_224", TWO),
    Case("openai_clip", "vit_base_patch32_clip_quickgelu_224", {**TWO, "embed_dim": 96}, (64, 64)),
    Case("openai_clip", "vit_xsmall_patch16_clip_224", TWO, (48, 48), (64, 80)),
    Case("openai_clip", "vit_xsmall_patch16_clip_224", TWO, dtype="float16"),
    Case("open_clip_trunk", "vit_medium_patch16_clip_224", TWO),
    Case("open_clip_trunk", "vit_base_patch16_siglip_224", {**TWO, "embed_dim": 96}),
    Case("open_clip_trunk", "convnext_base", {**FEW, "dims": [16, 24, 32, 48]}, (64, 96)),
    Case("open_clip_trunk_mlp", "convnext_large_mlp", {**FEW, "dims": [16, 24, 32, 48]}, (64, 64)),
    Case("meta_dinov2", "vit_small_patch14_dinov2", TWO, (42, 42)),
    Case("meta_dinov2", "vit_small_patch14_dinov2", TWO, (42, 42), (56, 70)),
    Case("meta_dinov2", "vit_small_patch14_reg4_dinov2", TWO, (42, 42)),
    Case("meta_dinov2", "vit_small_patch14_reg4_dinov2", TWO, (42, 42), (28, 42), "bfloat16"),
    Case("meta_dinov2", "vit_giant_patch14_dinov2", SWIGLU, (42, 42)),
    Case("meta_dinov2", "vit_giant_patch14_reg4_dinov2", SWIGLU, (42, 42)),
    Case(
        "tips", "vit_base_patch14_reg1_tipsv2", {**TWO, "embed_dim": 192, "num_heads": 3}, (42, 42)
    ),
    Case("meta_convnext", "convnext_tiny", FEW, (64, 64)),
    Case("meta_convnext", "convnext_atto", FEW, (64, 96)),  # 1x1 convolutions
    Case("meta_convnext", "convnextv2_atto", FEW, (64, 64)),
    Case("meta_convnext", "convnextv2_nano", {**FEW, "dims": [16, 24, 32, 48]}, (64, 64)),
    Case("eupe_convnext", "convnext_tiny", FEW, (64, 64)),
    Case("deit3", "deit3_small_patch16_224", TWO),
    Case("deit3", "deit3_small_patch16_224", TWO, (48, 48), (64, 48), "float16"),
    Case("plain", "deit_tiny_patch16_224", TWO),
    Case("plain", "deit_tiny_distilled_patch16_224", TWO),
    Case("flat_vit", "vit_tiny_patch16_224", TWO),
    Case("beit3", "beit3_base_patch16_224", {**TWO, "embed_dim": 192, "num_heads": 3}),
    Case(
        "beit3",
        "beit3_base_patch16_224",
        {**TWO, "embed_dim": 192, "num_heads": 3},
        (48, 48),
        (64, 32),
    ),
    Case("ijepa", "vit_huge_patch14_gap_224", {**TWO, "embed_dim": 192, "num_heads": 3}, (42, 42)),
    Case("aimv2", "aimv2_large_patch14_224", {**TWO, "embed_dim": 128, "num_heads": 2}, (42, 42)),
    Case("radio", "vit_base_patch16_radio_v3", {**TWO, "embed_dim": 96, "num_heads": 3}),
    Case(
        "radio", "vit_so400m_patch16_radio_v4", {**TWO, "embed_dim": 96, "num_heads": 3}, (32, 128)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_foreign_checkpoint_answers_as_in_timm(
    case: Case, foreign_oracle: Oracle, record_property: Any
) -> None:
    size = case.new_size or case.size
    folder = foreign_oracle.case(
        "make",
        arch=case.arch,
        layout=case.layout,
        overrides=case.overrides,
        img_size=case.size,
        new_size=size,
        dtype=case.dtype,
    )
    model = tfimm_lora.create_model(
        case.arch,
        model_path=folder / "foreign.safetensors",
        input_size=size,
        **case.overrides,
    )
    ours, theirs = timm_weights(model), load_tensors(folder / "weights.safetensors")
    assert sorted(ours) == sorted(theirs)
    # Of a table that is rounded after resizing, a value between two may be rounded either way.
    rounding = {"float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]
    for key, value in theirs.items():
        if key == "pos_embed":
            np.testing.assert_allclose(ours[key], value, rtol=rounding, atol=rounding, err_msg=key)
            assert np.mean(ours[key] == value) > (0.95 if case.dtype != "float32" else 0)
        else:
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
    errors = {
        "logits": relative_error(model(load(folder, "input")), load(folder, "logits")),
        "features": relative_error(
            model.forward_features(load(folder, "input")), load(folder, "features")
        ),
    }
    record_property("relative_errors", errors)
    tolerance = TIMM_TOLERANCE if case.dtype == "float32" else 2e-3
    assert max(errors.values()) <= tolerance, errors
