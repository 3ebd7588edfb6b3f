"""DINOv2's trained weights, whose activations are far from those of random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import TIMM_TOLERANCE, load, relative_error

NAME = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("size", [[98, 126], [224, 224]])
def test_dinov2(
    size: list[int], shared_dir: Path, timm_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    """Trained at 518 pixels, so its position table is resized."""
    weights = shared_dir / "weights" / f"{NAME}.safetensors"
    (tmp_path / "weights.safetensors").symlink_to(weights)
    (tmp_path / "meta.json").write_text(
        json.dumps({"class": "VisionTransformer", "input_size": [3, 518, 518], "num_classes": 0})
    )
    with timm_oracle.passing_case(
        "adapt", arch=NAME, source=str(tmp_path), img_size=size, batch=1
    ) as case:
        model = tfimm_lora.create_model(NAME, model_path=str(weights), input_size=tuple(size))
        features = model.forward_features(load(case, "input"), training=False)
        errors = {
            "features": relative_error(features, load(case, "features")),
            "pooled": relative_error(model(load(case, "input")), load(case, "logits")),
        }
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors
