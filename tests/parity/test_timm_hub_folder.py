"""Folders that timm itself writes for the hub (``config.json``, ``model.safetensors``)."""

from __future__ import annotations

from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import TIMM_TOLERANCE, load, relative_error

FOLDERS = [
    ("test_vit", {}),
    ("test_vit", {"num_classes": 7, "in_chans": 1, "img_size": 96}),
    ("test_vit2", {"img_size": [96, 64], "num_classes": 0}),
    ("test_vit", {"depth": 2, "reg_tokens": 2, "img_size": 64}),
    ("test_vit", {"class_token": False, "global_pool": "avg", "no_embed_class": True}),
    ("test_convnext", {"num_classes": 3, "in_chans": 5}),
    ("test_convnext2", {"depths": [1, 2, 1, 1], "dims": [16, 24, 32, 40]}),
]


@pytest.mark.parametrize(("name", "overrides"), FOLDERS)
def test_folder_of_timm(
    name: str, overrides: dict[str, Any], timm_oracle: Oracle, record_property: Any
) -> None:
    """Classes, channels, size and constructor arguments are those of the folder."""
    folder = timm_oracle.case("hub_folder", arch=name, overrides=overrides)
    model = tfimm_lora.create_model(name, pretrained=str(folder))
    assert model.cfg.in_channels == overrides.get("in_chans", 3)
    error = relative_error(model(load(folder, "input"), training=False), load(folder, "logits"))
    record_property("relative_errors", {"logits": error})
    assert error <= TIMM_TOLERANCE


def test_what_the_user_says_comes_first(timm_oracle: Oracle) -> None:
    folder = timm_oracle.case("hub_folder", arch="test_vit", overrides={"depth": 2, "in_chans": 1})
    model = tfimm_lora.create_model(
        "test_vit", pretrained=str(folder), in_channels=3, nb_classes=5, input_size=(64, 48)
    )
    assert (model.cfg.in_channels, model.cfg.nb_classes, model.cfg.depth) == (3, 5, 2)
    assert model(model.dummy_inputs).shape == (1, 5)
