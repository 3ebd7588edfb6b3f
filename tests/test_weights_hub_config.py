"""``config.json`` as timm has written it over the years, and files that are something else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.weights.hub_config import read_hub_config


@pytest.fixture
def read(tmp_path):
    """Reads a dictionary, or a text, as ``config.json``."""

    def call(config: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return read_hub_config(path)

    return call


FACTS = {
    "tag": "in1k",
    "custom_load": False,
    "input_size": [3, 160, 160],
    "test_input_size": [3, 192, 192],
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 0.95,
    "crop_mode": "squash",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "num_classes": 1000,
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": ["head", "head_dist"],
    "license": "mit",
}


def test_the_present_layout(read):
    cfg, arguments = read(
        {
            "architecture": "test_vit",
            "num_classes": 7,
            "num_features": 64,
            "global_pool": "avg",
            "label_names": ["a", "b"],
            "model_args": {"depth": 2},
            "pretrained_cfg": FACTS,
        }
    )
    assert cfg == PretrainedConfig(
        architecture="test_vit",
        tag="in1k",
        hf_hub_filename="",
        num_classes=7,
        input_size=(3, 160, 160),
        test_input_size=(3, 192, 192),
        fixed_input_size=True,
        interpolation="bilinear",
        crop_pct=0.95,
        crop_mode="squash",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        first_conv="patch_embed.proj",
        classifier=("head", "head_dist"),
        license="mit",
    )
    # global_pool and num_features at the top are notes.
    assert arguments == {"depth": 2}


def test_the_old_layout(read):
    """Everything at the top."""
    cfg, arguments = read({"architecture": "test_vit.in1k", "num_features": 64, **FACTS})
    again, _ = read({"architecture": "test_vit", "pretrained_cfg": FACTS})
    assert cfg == again and arguments == {}


def test_a_tag_can_be_part_of_the_name(read):
    cfg, _ = read({"architecture": "test_vit.own"})
    assert (cfg.architecture, cfg.tag) == ("test_vit", "own")


def test_defaults_are_timms(read):
    cfg, _ = read({"architecture": "test_vit"})
    assert cfg == PretrainedConfig(architecture="test_vit", hf_hub_filename="")
    assert (cfg.num_classes, cfg.input_size, cfg.crop_pct) == (1000, (3, 224, 224), 0.875)


def test_beside_pretrained_cfg_only_the_classes_count(read):
    config = {"architecture": "test_vit", "mean": [0, 0, 0], "num_classes": 3, "license": "x"}
    cfg, _ = read({**config, "pretrained_cfg": {}})
    assert (cfg.num_classes, cfg.license) == (3, "")
    assert cfg.mean == PretrainedConfig().mean


def test_a_file_cannot_say_where_other_files_are(read):
    cfg, _ = read(
        {
            "architecture": "test_vit",
            "pretrained_cfg": {"file": "/etc/passwd", "hf_hub_id": "a/b", "has_weights": False},
        }
    )
    assert (cfg.file, cfg.hf_hub_id, cfg.has_weights) == ("", "", True)


@pytest.mark.parametrize(
    ("arguments", "facts", "expected"),
    [
        ({"in_chans": 1}, {}, {"input_size": (1, 160, 160), "test_input_size": (1, 192, 192)}),
        ({"img_size": 96}, {}, {"input_size": (3, 96, 96)}),
        ({"img_size": [96, 64], "in_chans": 4}, {}, {"input_size": (4, 96, 64)}),
        ({"img_size": 96}, {"fixed_input_size": False}, {"input_size": (3, 160, 160)}),
        ({"dynamic_img_size": True, "img_size": 96}, {}, {"fixed_input_size": False}),
        ({"strict_img_size": False}, {}, {"fixed_input_size": False}),
        ({"in_chans": 2}, {"input_size": None}, {"input_size": (2, 224, 224)}),
    ],
)
def test_arguments_of_the_saved_model_correct_the_facts(arguments, facts, expected, read):
    config = {"architecture": "test_vit", "model_args": arguments}
    cfg, found = read({**config, "pretrained_cfg": {**FACTS, **facts}})
    assert {key: getattr(cfg, key) for key in expected} == expected
    assert found == arguments


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not a timm config.json: it cannot be read as JSON .* fetch or copy it again"),
        ("", "cannot be read as JSON"),
        ("[]", "is not a timm config.json with a field 'architecture'.$"),
        ("{}", "is not a timm config.json with a field 'architecture'.$"),
        ({"architecture": 3}, "with a field 'architecture'.$"),
        ({"architecture": "a", "pretrained_cfg": "b"}, "field of an unexpected form"),
        ({"architecture": "a", "model_args": [1]}, "field of an unexpected form"),
        ({"architecture": "a", "input_size": 224}, "field of an unexpected form"),
        ({"architecture": "a", "input_size": "abc"}, r"input_size='abc' is not \[channels, h"),
        ({"architecture": "a", "input_size": [224, 224]}, "is not .channels, height, width"),
        ({"architecture": "a", "test_input_size": [3, 0, 1]}, "test_input_size=.* is not .chan"),
        ({"architecture": "a", "num_classes": "7"}, "num_classes='7' is no number of classes"),
        ({"architecture": "a", "mean": ["x"]}, r"mean=\('x',\) is not one number per channel"),
        (
            {"architectures": ["ViTModel"], "model_type": "vit"},
            "describes a ViTModel of the library transformers.*model_path='.../model.safetensors'",
        ),
        ({"model_type": "vit"}, "describes a vit of the library transformers"),
    ],
)
def test_other_files_are_errors_that_say_what_was_found(config: Any, message: str, read):
    with pytest.raises(ValueError, match=message) as error:
        read(config)
    assert "config.json" in str(error.value)


def test_a_binary_file(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\x80\x04\xff")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_hub_config(tmp_path / "config.json")
