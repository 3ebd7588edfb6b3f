"""Recipes: defaults, round trips, values without sense; and folders that are complete or absent."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from tfimm_lora.training import DataConfig, LoraSection, ModelSection, RunConfig, TrainSection
from tfimm_lora.training.config import DEFAULT_LEARNING_RATES
from tfimm_lora.training.errors import RecipeError
from tfimm_lora.training.files import new_folder, write_text
from tfimm_lora.training.fit import validated_epochs
from tfimm_lora.training.recipes import recipe_path


def test_lora_section_mirrors_the_lora_config():
    from tfimm_lora.lora import LoRAConfig

    expected = {
        field.name.removeprefix("lora_"): field
        for field in dataclasses.fields(LoRAConfig)
        if field.name.startswith("lora_")
    }
    found = {field.name: field for field in dataclasses.fields(LoraSection)}
    assert set(found) == set(expected)
    defaults, wanted = LoraSection(), LoRAConfig()
    for name in found:
        mine, theirs = getattr(defaults, name), getattr(wanted, f"lora_{name}")
        assert (tuple(mine) if isinstance(mine, list) else mine) == theirs


def test_only_what_is_set_is_passed_on():
    assert LoraSection().arguments() == {
        "lora_rank": 4, "lora_method": "lora", "lora_dropout": 0.0, "lora_train_bias": "none",
        "lora_adapter_name": "default", "lora_quantize_merged": False,
    }  # fmt: skip
    section = LoraSection(rank=8, targets=["attn.q"], rank_pattern={"blocks.0.*": 2})
    assert section.arguments()["lora_targets"] == ["attn.q"]
    assert section.arguments()["lora_rank_pattern"] == {"blocks.0.*": 2}
    assert LoraSection(train_classifier=False).arguments()["lora_train_classifier"] is False
    section = LoraSection(quantization={"head": None, "*": "int4"}, group_size=64)
    assert section.arguments()["lora_quantization"] == {"head": None, "*": "int4"}
    assert section.arguments()["lora_group_size"] == 64


def test_model_section_becomes_arguments():
    section = ModelSection("convnext_tiny", input_size=96, options={"drop_path_rate": 0.1})
    assert section.arguments() == {
        "drop_path_rate": 0.1, "pretrained": True, "input_size": (96, 96)
    }  # fmt: skip
    section = ModelSection("convnext_tiny", path="weights.safetensors")
    assert section.arguments() == {"pretrained": False, "model_path": "weights.safetensors"}


def test_recipe_survives_yaml():
    config = RunConfig(
        ModelSection("vit_digits", input_size=(32, 16)),
        DataConfig("digits", classes=["6", "7"]),
        LoraSection(rank=2),
        TrainSection(methods=["lora", "full"], learning_rate={"lora": 1e-3}),
        "runs/x",
    )
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_embedded_recipe_is_a_recipe():
    values = yaml.safe_load(recipe_path("digits").read_text(encoding="utf-8"))
    config = RunConfig.from_dict(values)
    assert config.train.method_names == ("linear_probe", "lora", "full")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "no key 'modle'. Did you mean 'model'"),
        ({"train": {"epoch": 3}}, "section 'train' has no key 'epoch'. Did you mean 'epochs'"),
    ],
)
def test_unknown_keys_suggest_the_nearest(values, message):
    with pytest.raises(RecipeError, match=message):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "train.epochs has to be 1 or more"),
        ({"batch_size": 0}, "train.batch_size has to be 1 or more"),
        ({"warmup": 1.0}, "train.warmup is a share"),
        ({"methods": []}, "names no method"),
        ({"learning_rate": -1.0}, "has to be above 0"),
        ({"learning_rate": {"lroa": 1e-3}}, "names lroa"),
    ],
)
def test_values_without_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        TrainSection(**options)


def test_rates_per_method():
    assert TrainSection().rate("full") == DEFAULT_LEARNING_RATES["full"]
    assert TrainSection(learning_rate=0.5).rate("full") == 0.5
    section = TrainSection(learning_rate={"lora": 0.25})
    assert section.rate("lora") == 0.25
    assert section.rate("full") == DEFAULT_LEARNING_RATES["full"]


def test_the_last_epoch_is_validated():
    assert validated_epochs(10, 4) == [4, 8, 10]
    assert validated_epochs(2, 5) == [2]
    assert validated_epochs(3, 1) == [1, 2, 3]


# --- Folders ------------------------------------------------------------------------------------


def test_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "runs" / "first"
    with new_folder(target) as folder:
        write_text(folder / "metrics.json", "{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["metrics.json"]
    assert [path.name for path in target.parent.iterdir()] == ["first"]


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"no"), new_folder(tmp_path / "first") as folder:
        write_text(folder / "metrics.json", "{}")
        raise RuntimeError("no")
    assert not list(tmp_path.iterdir())


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "first").mkdir()
    write_text(tmp_path / "first" / "metrics.json", "old")
    with pytest.raises(RecipeError, match=r"exists already"), new_folder(tmp_path / "first"):
        pass
    assert (tmp_path / "first" / "metrics.json").read_text() == "old"
