"""Weights loaded into a model of another image size, patch size, channel or class count.

The oracle runs timm's own loader; whatever it makes of the same file has to come out here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import reduced
from tests.parity.compare import (
    TIMM_TOLERANCE,
    load,
    load_tensors,
    relative_error,
    set_timm_weights,
    timm_weights,
)

OTHER_SPELLING = {"num_classes": "nb_classes", "in_chans": "in_channels", "img_size": "input_size"}

# (architecture, what changes: timm's names, image sizes in patches for a ViT)
CHANGES = [
    ("test_vit", {"img_size": (5, 4)}),
    ("test_vit", {"img_size": (2, 2)}),
    ("test_vit", {"in_chans": 1}),
    ("test_vit", {"in_chans": 5}),
    ("test_vit", {"num_classes": 5}),
    ("test_vit", {"num_classes": 0}),
    ("test_vit", {"patch_size": 8, "img_size": (6, 6)}),
    ("test_vit", {"patch_size": 32, "img_size": (2, 3)}),
    ("test_vit", {"img_size": (7, 3), "in_chans": 4, "num_classes": 11}),
    ("test_vit2", {"img_size": (4, 6)}),
    ("test_vit2", {"num_classes": 3, "in_chans": 1}),
    ("deit3_small_patch16_224", {"img_size": (8, 5)}),
    ("deit_tiny_patch16_224", {"img_size": (4, 4), "num_classes": 7}),
    ("vit_small_patch14_dinov2", {"img_size": (6, 4), "num_classes": 9}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": (2, 5), "in_chans": 1}),
    ("vit_xsmall_patch16_clip_224", {"img_size": (5, 5), "num_classes": 0}),
    ("deit_tiny_distilled_patch16_224", {"img_size": (4, 5), "num_classes": 7, "in_chans": 2}),
    ("flexivit_small", {"img_size": (5, 2), "num_classes": 3}),  # bilinear, not antialiased
    ("flexivit_small", {"patch_size": 24, "img_size": (2, 4)}),
    ("flexivit_small", {"patch_size": 8, "img_size": (6, 5)}),
    ("test_vit3", {"img_size": (2, 4), "in_chans": 1, "num_classes": 4}),  # attention pooling
    ("vit_base_patch16_radio_v3", {"img_size": (5, 4), "in_chans": 4}),  # with corners aligned
    ("vit_so400m_patch16_radio_v4", {"img_size": (2, 6)}),
    ("vit_dpwee_patch16_reg1_gap_256", {"img_size": (2, 5), "num_classes": 6}),
    ("convnext_atto", {"in_chans": 1}),
    ("convnext_atto", {"in_chans": 5, "num_classes": 5}),
    ("convnext_atto", {"img_size": (96, 32)}),
    ("convnext_atto", {"num_classes": 0}),
    ("convnext_atto_ols", {"in_chans": 1, "num_classes": 3}),
    ("convnext_zepto_rms_ols", {"in_chans": 4, "img_size": (96, 64)}),
    ("convnext_tiny_hnf", {"num_classes": 0, "img_size": (32, 64)}),
    ("convnextv2_atto", {"num_classes": 2, "in_chans": 2}),
    ("test_convnext", {"in_chans": 6, "num_classes": 4, "img_size": (100, 70)}),
]


def identifier(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()).replace(" ", "")
    return str(value)


def requests(
    name: str, facts: dict[str, Any], change: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The source's request, the overrides of the changed model and its image size in pixels."""
    source = reduced(facts)
    overrides = {**source["overrides"], **change}
    size = list(overrides.pop("img_size", ())) or source["img_size"]
    if "img_size" in change and facts["module"] != "convnext":
        patch = overrides.get("patch_size", facts["kwargs"].get("patch_size", 16))
        size = [patch * n for n in size]
    return source, overrides, size


def compare(model: Any, adapted: Path, nb_classes: int, fresh_head: bool) -> dict[str, float]:
    """Relative errors; a fresh head is taken over from timm, everything else has to be equal."""
    ours, theirs = timm_weights(model), load_tensors(adapted / "weights.safetensors")
    assert sorted(ours) == sorted(theirs)
    heads = ("head", "head_dist", "head.fc")
    head = {f"{h}.{leaf}" for h in heads for leaf in ("weight", "bias")} if fresh_head else set()
    for key in set(theirs) - head:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=5e-6, err_msg=key)
    if head:
        for key in head & set(theirs):
            assert not np.array_equal(ours[key], theirs[key]), f"{key} should be fresh"
        set_timm_weights(model, {k: theirs[k] for k in head & set(theirs)})
    logits = model(load(adapted, "input"), training=False)
    assert logits.shape[-1] == (nb_classes or model.num_features)
    features = model.forward_features(load(adapted, "input"), training=False)
    return {
        "logits": relative_error(logits, load(adapted, "logits")),
        "features": relative_error(features, load(adapted, "features")),
    }


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=identifier)
def test_changed_model_equals_timm(
    name: str, change: dict, timm_oracle: Oracle, zoo: dict, record_property: Any
) -> None:
    source_request, overrides, size = requests(name, zoo["archs"][name], change)
    source = timm_oracle.case("make", arch=name, **source_request)
    adapted = timm_oracle.case(
        "adapt", arch=name, source=str(source), overrides=overrides, img_size=size
    )
    ours = {OTHER_SPELLING.get(k, k): v for k, v in overrides.items()}
    model = tfimm_lora.create_model(
        name, model_path=str(source / "weights.safetensors"), input_size=tuple(size), **ours
    )
    source_classes = zoo["archs"][name]["num_classes"]
    classes = overrides.get("num_classes", source_classes)
    errors = compare(model, adapted, classes, fresh_head=classes not in (0, source_classes))
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors


# --- Grids that are not square: the checkpoint's own size has to be known ----------------------

GRIDS = [
    ((2, 6), (2, 6)),  # nothing to do
    ((2, 6), (4, 3)),  # as many patches, another shape: resized nevertheless
    ((2, 6), (5, 2)),
    ((5, 3), (4, 4)),
]


@pytest.mark.parametrize(("source_grid", "grid"), GRIDS, ids=identifier)
def test_folder_tells_the_shape_of_the_grid(
    source_grid: tuple, grid: tuple, timm_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    """A folder in the hub's layout names the size that its weights were trained with."""
    name, patch = "test_vit2", 16
    source_size, size = ([patch * n for n in g] for g in (source_grid, grid))
    source = timm_oracle.case("make", arch=name, img_size=source_size)
    adapted = timm_oracle.case("adapt", arch=name, source=str(source), img_size=size)
    shutil.copy(source / "weights.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": name,
                "num_classes": 1000,
                "pretrained_cfg": {
                    "tag": "mine",
                    "num_classes": 1000,
                    "input_size": [3, *source_size],
                    "first_conv": "patch_embed.proj",
                    "classifier": "head",
                },
            }
        )
    )
    model = tfimm_lora.create_model(name, pretrained=str(tmp_path), input_size=tuple(size))
    errors = compare(model, adapted, 1000, fresh_head=False)
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors


# --- Types on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext3"])
def test_every_type_on_disk_is_read(
    name: str, dtype: str, timm_oracle: Oracle, zoo: dict, record_property: Any
) -> None:
    """timm computes in float32 with weights that were rounded to the type."""
    request = reduced(zoo["archs"][name])
    case = timm_oracle.case("make", arch=name, **request, dtype=dtype)
    path = case / "weights.safetensors"
    assert {str(v.dtype) for v in load_file(path).values()} == {dtype}
    model = tfimm_lora.create_model(
        name, model_path=str(path), input_size=tuple(request["img_size"])
    )
    error = relative_error(model(load(case, "input"), training=False), load(case, "logits"))
    record_property("relative_errors", {dtype: error})
    assert error <= TIMM_TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [("test_vit", {"in_chans": 5}, [80, 64]), ("test_convnext3", {"in_chans": 1}, [64, 96])],
)
def test_adapted_weights_keep_the_precision_of_the_file(
    name: str,
    overrides: dict,
    size: list[int],
    dtype: str,
    timm_oracle: Oracle,
    zoo: dict,
    record_property: Any,
) -> None:
    """timm rounds a resized position table to the checkpoint's type; so a DINOv2 in float16."""
    request = reduced(zoo["archs"][name])
    source = timm_oracle.case("make", arch=name, **request, dtype=dtype)
    adapted = timm_oracle.case(
        "adapt", arch=name, source=str(source), overrides=overrides, img_size=size
    )
    model = tfimm_lora.create_model(
        name,
        model_path=str(source / "weights.safetensors"),
        in_channels=overrides["in_chans"],
        input_size=tuple(size),
    )
    error = relative_error(model(load(adapted, "input")), load(adapted, "logits"))
    record_property("relative_errors", {dtype: error})
    # A value between two of the type may be rounded either way.
    assert error <= (2e-3 if dtype == "bfloat16" else 3e-4)
    ours, theirs = timm_weights(model), load_tensors(adapted / "weights.safetensors")
    equal = [np.mean(ours[key] == theirs[key]) for key in theirs]
    assert min(equal) > 0.99


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_saved_weights_are_read_by_timm(
    dtype: str, timm_oracle: Oracle, zoo: dict, tmp_path: Path
) -> None:
    """timm loads our file strictly and answers as our model does."""
    from tfimm_lora import models

    name = "test_convnext3"
    request = reduced(zoo["archs"][name])
    case = timm_oracle.case("make", arch=name, **request, dtype=dtype)
    model = tfimm_lora.create_model(name, model_path=str(case / "weights.safetensors"))
    mine = models.save_safetensors(model, tmp_path / "mine.safetensors", dtype=dtype)
    answer = timm_oracle.call(
        "load",
        arch=name,
        weights=str(mine),
        inputs=str(case / "input.npy"),
        out=str(tmp_path / "logits.npy"),
    )
    assert answer == {"dtypes": [dtype]}
    assert relative_error(np.load(tmp_path / "logits.npy"), load(case, "logits")) <= 1e-6
