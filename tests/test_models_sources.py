"""Names that say where a model comes from: ``hf-hub:``, ``local-dir:``, tags, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tfimm_lora
from tests.helpers import TINY, assert_same_bits, tiny_model, values
from tfimm_lora import lora, models
from tfimm_lora.models.sources import architecture_of, resolve_source
from tfimm_lora.weights.hub import find_checkpoint, find_config, split_source

NAME = TINY["vit"][0]
ARGUMENTS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture
def folder(tmp_path):
    """A fine-tune of a tiny ViT, as timm writes it; returns the model and its folder."""
    model = tiny_model("vit")
    models.save_safetensors(model, tmp_path / "model.safetensors")
    write(tmp_path)
    return model, tmp_path


def write(folder: Path, **more: Any) -> None:
    facts = {"tag": "mine", "input_size": [3, 16, 16], "fixed_input_size": True}
    config = {"architecture": NAME, "num_classes": 10, "model_args": ARGUMENTS}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": facts, **more}))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf-hub:org/repo@v2", ("hf-hub:", "org/repo@v2")),
        ("hf_hub:org/repo", ("hf-hub:", "org/repo")),
        ("HF-HUB:org/repo", ("hf-hub:", "org/repo")),
        ("local-dir:/a/b:c", ("local-dir:", "/a/b:c")),
        ("vit_tiny_patch16_224", ("", "vit_tiny_patch16_224")),
        ("C:\\models\\mine", ("", "C:\\models\\mine")),
        ("/a/hf-hub", ("", "/a/hf-hub")),
        ("hf-hub", ("", "hf-hub")),
    ],
)
def test_prefixes(source: str, parts: tuple[str, str]):
    assert split_source(source) == parts


@pytest.mark.parametrize(
    ("source", "example"),
    [("hf-hub:", "hf-hub:org/repo"), ("local-dir:", "local-dir:/path/of/a/folder")],
)
def test_prefixes_without_a_place(source: str, example: str):
    with pytest.raises(ValueError, match=f"'{source}' names no place. Write {example}"):
        tfimm_lora.create_model(source)


@pytest.mark.parametrize("create", [tfimm_lora.create_model, lora.create_model])
def test_a_folder_as_name_says_everything_itself(create, folder):
    model, path = folder
    loaded = create(f"local-dir:{path}", pretrained=True)
    found = {p: v for p, v in values(loaded).items() if "_lora_" not in p}
    assert_same_bits(found, values(model))
    assert loaded.cfg.name == NAME and loaded.pretrained_cfg.tag == "mine"
    fresh = create(f"local-dir:{path}")
    assert fresh.cfg == loaded.cfg
    assert not (values(fresh)["head/kernel"] == values(model)["head/kernel"]).any()


def test_the_same_folder_with_and_without_prefix(folder):
    model, path = folder
    for source in (str(path), f"local-dir:{path}"):
        assert_same_bits(values(tfimm_lora.create_model(NAME, pretrained=source)), values(model))
        assert find_checkpoint(source).path == path / "model.safetensors"
        assert find_config(source)[1] == ARGUMENTS
    assert architecture_of(f"local-dir:{path}") == architecture_of(NAME) == NAME


def test_what_the_user_says_goes_before_the_folder(folder):
    _, path = folder
    model = tfimm_lora.create_model(
        f"local-dir:{path}", pretrained=True, nb_classes=3, in_channels=1, input_size=(24, 16)
    )
    assert model(model.dummy_inputs).shape == (1, 3)
    assert model.dummy_inputs.shape == (1, 24, 16, 1)
    assert model.pretrained_cfg.num_classes == 10


def test_a_name_and_a_source_that_contradict_each_other(folder):
    _, path = folder
    with pytest.raises(ValueError, match=r"names its weights already.*Use pretrained=True"):
        tfimm_lora.create_model(f"local-dir:{path}", pretrained="hf-hub:org/repo")
    with pytest.raises(ValueError, match=rf"weights of '{NAME}', not of 'vit_small_patch16_224'"):
        tfimm_lora.create_model("vit_small_patch16_224", pretrained=str(path))
    with pytest.raises(ValueError, match=r"has the tag 'augreg_in21k' and pretrained='other'"):
        tfimm_lora.create_model(f"{NAME}.augreg_in21k", pretrained="other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/repo", "'org/repo' is no name of a model.*write 'hf-hub:org/repo', for a folder 'lo"),
        ("./mine", "for a folder 'local-dir:./mine'"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
    ],
)
def test_names_that_are_none(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_source(name)


@pytest.mark.parametrize(
    ("pretrained", "error", "message"),
    [
        ("no/such/folder", FileNotFoundError, "there is no such folder.*'hf-hub:org/repo'"),
        ("no_such_tag", ValueError, "no_such_tag"),
        ("local-dir:/no/such", FileNotFoundError, "There is no folder /no/such to load"),
        ("hf-hub:repo", OSError, "'repo' is no name of a repository, which is org/repo"),
        ("hf-hub:a/b/c", OSError, "'a/b/c' is no name of a repository"),
    ],
)
def test_sources_that_are_none(pretrained: str, error: type, message: str):
    with pytest.raises(error, match=message):
        tfimm_lora.create_model(NAME, pretrained=pretrained)


# --- Arguments of config.json -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"img_size": 24, "num_classes": 4, "in_chans": 2},
         {"input_size": (24, 24), "nb_classes": 4, "in_channels": 2}),
        ({"img_size": [24, 16], "global_pool": "avg"},
         {"input_size": (24, 16), "global_pool": "avg"}),
        ({"norm_layer": "layernorm2d", "drop_path_rate": 0.2}, {"drop_path_rate": 0.2}),
        ({"weight_init": "jax", "fix_init": True, "pos_embed": "learn", "unheard_of": None}, {}),
        ({"unheard_of": False, "no_embed_class": True}, {"no_embed_class": True}),
    ],
)  # fmt: skip
def test_arguments_become_fields(arguments: dict, fields: dict, tmp_path):
    write(tmp_path, model_args={**ARGUMENTS, **arguments})
    cfg = resolve_source(f"local-dir:{tmp_path}").cfg
    expected = {**ARGUMENTS, "nb_classes": 10, "input_size": (16, 16), "in_channels": 3, **fields}
    assert {key: getattr(cfg, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pos_embed": "none"}, "asks for pos_embed='none'; models here have pos_embed='learn'"),
        ({"unheard_of": 3}, "unheard_of"),
        ({"act_layer": "no_such"}, "no_such"),
    ],
)
def test_arguments_that_are_not_known(arguments: dict, message: str, tmp_path):
    write(tmp_path, model_args=arguments)
    with pytest.raises(ValueError, match=message):
        tfimm_lora.create_model(f"local-dir:{tmp_path}")


def test_retired_names_in_config_json(tmp_path):
    write(tmp_path, architecture="convnext_tiny_in22ft1k", model_args={})
    with pytest.warns(UserWarning, match="is called 'convnext_tiny.fb_in22k_ft_in1k' now"):
        source = resolve_source(f"local-dir:{tmp_path}")
    assert source.entry.name == source.facts.architecture == "convnext_tiny"


# --- Weights of a folder ----------------------------------------------------------------------


def test_weights_under_other_names(folder):
    model, path = folder
    weights = path / "model.safetensors"
    for name in ("open_clip_model.safetensors", "own.safetensors"):
        weights = weights.rename(path / name)
        assert find_checkpoint(str(path)).path == weights
    write(path, pretrained_cfg={"hf_hub_filename": "a.bin", "input_size": [3, 16, 16]})
    weights.rename(path / "a.safetensors")
    (path / "b.safetensors").write_bytes(b"")
    loaded = tfimm_lora.create_model(NAME, pretrained=str(path))
    assert_same_bits(values(loaded), values(model))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], FileNotFoundError, "has no model.safetensors. Beside config.json there has to be"),
        (["a.safetensors", "b.safetensors"], ValueError, "but 2 other files .*Rename the right"),
        (["pytorch_model.bin"], ValueError, "only as pytorch_model.bin, a pickle"),
        (["my.ckpt"], ValueError, "only as my.ckpt, a pickle.*create_model.'local-dir:"),
        (["model.safetensors.index.json"], ValueError, "in several files .model.safetensors.ind"),
    ],
)
def test_folders_without_weights_that_are_read(files: list[str], error, message: str, tmp_path):
    write(tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(error, match=message):
        tfimm_lora.create_model(NAME, pretrained=str(tmp_path))


def test_tags_without_weights():
    facts = models.pretrained_config("convnext_tiny")
    facts.has_weights = False
    with pytest.raises(ValueError, match=r"no pretrained weights for 'convnext_tiny\.in12k"):
        find_checkpoint(facts)


@pytest.mark.parametrize("name", tfimm_lora.list_models("*ijepa*", include_tags=True))
def test_tags_whose_weights_are_a_pickle_of_their_authors(name: str):
    with pytest.raises(
        ValueError, match=r"are not on the hub\. .* pickle, .*: https://\S+\.tar\. "
    ):
        tfimm_lora.create_model(name, pretrained=True)
