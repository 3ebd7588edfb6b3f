"""What is known about timm's checkpoints: tags, preprocessing, licences, places on the hub."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.parity.cases import ALL
from tfimm_lora.models import pretrained_config

EQUAL = (
    "num_classes",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "first_conv",
    "classifier",
    "has_weights",
)


def tags(zoo: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Facts by tag, the default one first."""
    rows = [dict(zip(zoo["tag_columns"], row, strict=True)) for row in zoo["archs"][name]["tags"]]
    return {row["tag"]: row for row in rows}


@pytest.mark.parametrize("name", ALL)
def test_facts_of_every_tag(name: str, zoo: dict[str, Any]) -> None:
    expected = tags(zoo, name)
    listed = tfimm_lora.list_models(f"{name}.*", include_tags=True)
    assert set(listed) == {f"{name}.{tag}" for tag in expected}
    assert pretrained_config(name).tag == next(iter(expected))
    for tag, row in expected.items():
        ours = pretrained_config(f"{name}.{tag}")
        for field in EQUAL:
            assert getattr(ours, field) == row[field], (tag, field)
        assert list(ours.input_size) == row["input_size"], tag
        assert list(ours.mean) == zoo["stats"]["mean"][row["mean"]], tag
        assert list(ours.std) == zoo["stats"]["std"][row["std"]], tag
        assert (ours.license or None) == (row["license"] or None), tag
        if row["has_weights"] and row["hf_hub_id"]:
            assert ours.hf_hub_id == row["hf_hub_id"], tag


def test_retired_names_resolve(zoo: dict[str, Any]) -> None:
    """timm's own table of renamed models, as far as the new names are in this package."""
    for module in ("convnext", "vision_transformer", "deit"):
        for old, new in zoo["deprecated_names"][module].items():
            if new.split(".")[0] not in ALL:
                continue
            with pytest.warns(Warning, match=new.split(".")[0]):
                ours = pretrained_config(old)
            assert f"{ours.architecture}.{ours.tag}".startswith(new), old


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "vit_tiny_patch16_224", "vit_small_patch14_dinov2"]
)
def test_preprocessing(name: str, zoo: dict[str, Any]) -> None:
    """[0, 255] to (x / 255 - mean) / std."""
    row = next(iter(tags(zoo, name).values()))
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 4, 3)).astype("float32")
    expected = (images / 255 - zoo["stats"]["mean"][row["mean"]]) / zoo["stats"]["std"][row["std"]]
    ours = np.asarray(tfimm_lora.create_preprocessing(name)(images))
    np.testing.assert_allclose(ours, expected, atol=2e-6)
