"""The licence of weights that are not free is shown once when they are loaded."""

from __future__ import annotations

import json
import warnings

import pytest

import tfimm_lora
from tests.helpers import TINY, tiny_model
from tfimm_lora import lora, models
from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.weights import LicenseWarning, licence
from tfimm_lora.weights.licence import is_free, license_text, warn_of_license


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    monkeypatch.setattr(licence, "_shown", set())


def facts(license: str, **more: str) -> PretrainedConfig:
    return PretrainedConfig(architecture="vit", tag="own", license=license, **more)


def shown(call) -> list[str]:
    """The licence warnings of a call, whatever filters are set."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if w.category is LicenseWarning]


@pytest.mark.parametrize("name", ["apache-2.0", "mit", "MIT", "bsd-3-clause", "isc", "cc0-1.0", ""])
def test_free_and_unknown_licences_are_not_mentioned(name: str):
    assert is_free(name) and license_text(facts(name)) == ""
    assert shown(lambda: warn_of_license(facts(name))) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cc-by-nc-4.0", "which does not allow commercial use"),
        ("fair-noncommercial-research-license", "which does not allow commercial use"),
        ("dinov3-license", "which restricts their use"),
        ("apple-amlr", "which restricts their use"),
    ],
)
def test_other_licences_are_named_with_where_to_read_them(name: str, says: str):
    assert not is_free(name)
    assert license_text(facts(name)) == (
        f"The weights of vit.own are under the licence '{name}', {says}. It can hold for models "
        "that are made from them, too."
    )
    text = license_text(facts(name, hf_hub_id="timm/vit.own"))
    assert text.endswith(" Its terms: https://huggingface.co/timm/vit.own")


def test_every_licence_of_the_zoo_is_told_apart():
    """A licence that nobody has looked at would be taken for a restrictive one."""
    tags = tfimm_lora.list_models(include_tags=True)
    found = {models.pretrained_config(name).license for name in tags}
    assert {name for name in found if is_free(name)} <= {"", "apache-2.0", "mit"}
    assert {"cc-by-nc-4.0", "dinov3-license"} <= {name for name in found if not is_free(name)}


def test_once_per_checkpoint():
    mine, other = (facts("cc-by-nc-4.0", file=f"/{name}") for name in "ab")
    calls = [mine, mine, other, mine, other]
    texts = shown(lambda: [warn_of_license(f) for f in calls])
    assert len(texts) == 2


def folder_with(tmp_path, **facts):
    """A pretrained folder of a tiny ViT, with facts in its ``config.json``."""
    model = tiny_model()
    models.save_safetensors(model, tmp_path / "model.safetensors")
    size = [3, *model.cfg.input_size]
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": model.cfg.nb_classes,
        "pretrained_cfg": {"input_size": size, **facts},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


INNER = {k: v for k, v in TINY["vit"][1].items() if k not in ("nb_classes", "input_size")}


@pytest.mark.parametrize("create", [tfimm_lora.create_model, lora.create_model])
def test_shown_when_a_folder_is_loaded(create, tmp_path):
    folder = folder_with(tmp_path, license="cc-by-nc-4.0")
    name = "vit_tiny_patch16_224"
    [text] = shown(lambda: create(name, pretrained=folder, **INNER))
    assert text.startswith(f"The weights of {name} are under the licence 'cc-by-nc-4.0'")
    assert shown(lambda: create(name, pretrained=folder, **INNER)) == []
    assert shown(lambda: create(name, **TINY["vit"][1])) == []


def test_not_shown_for_weights_that_do_not_load(tmp_path):
    folder = folder_with(tmp_path, license="cc-by-nc-4.0")

    def fails():
        with pytest.raises(ValueError, match="do not fit"):
            tfimm_lora.create_model(
                "vit_tiny_patch16_224", pretrained=folder, **{**INNER, "depth": 3}
            )

    assert shown(fails) == []


def test_a_known_tag_says_the_licence_that_config_json_leaves_out(tmp_path):
    """As timm writes it; a fine-tune keeps the tag of what it was made of."""
    folder = folder_with(tmp_path, tag="not_known")
    assert tfimm_lora.create_model("local-dir:" + folder, **INNER).pretrained_cfg.license == ""
    tagged = models.pretrained_config("convnextv2_atto.fcmae_ft_in1k")
    assert tagged.license == "cc-by-nc-4.0"
    config = {"architecture": "convnextv2_atto", "pretrained_cfg": {"tag": "fcmae_ft_in1k"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tfimm_lora.create_model("local-dir:" + folder, depths=(1, 1, 1, 1), dims=(8,) * 4)
    assert model.pretrained_cfg.license == "cc-by-nc-4.0"


def test_it_can_be_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LicenseWarning)
        warn_of_license(facts("cc-by-nc-4.0"))
