"""What is known about timm's models and checkpoints, against the installed timm itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import ALL
from tfimm_lora.models import model_class, pretrained_config

VARIANTS = Path(tfimm_lora.__file__).parent / "architectures" / "variants"
SCRIPT = VARIANTS / "from_timm.py"
TABLES = ("convnext", "vision_transformer", "deit", "retired_names", "source")

# timm's facts that are not kept here: `url` is (only) where the hub has no copy, the others say how
# timm reads the authors' file (a copy of which in timm's format is on the hub), or are for people.
NOT_KEPT = {"custom_load", "description", "origin_url", "paper_name", "paper_ids", "notes", "url"}
NOT_KEPT |= {"pool_size", "test_pool_size"}  # follow from the image size
# timm's facts that no checkpoint of these families has.
UNUSED = {"state_dict", "source", "min_input_size", "label_offset", "label_names"}
UNUSED |= {"label_descriptions"}

# timm's spellings of our fields, and fields that mean the same under other values.
RENAMED = {"nb_classes": "num_classes", "in_channels": "in_chans", "input_size": "img_size"}
NOT_DEFAULTS = {"norm_layer", "act_layer", "norm_eps", "input_size", "classifier"}


@pytest.fixture(scope="module")
def oracle(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """timm with the script that reads it."""
    oracle = Oracle(
        "timm_tables",
        oracle_python,
        Path(__file__).with_name("drive_timm_tables.py"),
        [SCRIPT, VARIANTS.parent / "pretrained.py"],
        oracle_cache,
        [str(shared_dir / "oracle" / "stubs"), str(SCRIPT)],
    )
    with contextlib.closing(oracle):
        yield oracle


@pytest.fixture(scope="module")
def timm(oracle: Oracle) -> dict[str, Any]:
    """timm's registry; see ``drive_timm_tables.py``."""
    return json.loads((oracle.case("facts") / "facts.json").read_text())


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value))


# --- The tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_those_of_the_installed_timm(table: str, oracle: Oracle) -> None:
    written = oracle.case("tables") / f"{table}.json"
    theirs, ours = (
        json.loads(written.read_text()),
        json.loads((VARIANTS / written.name).read_text()),
    )
    news = [f"new: {name}" for name in theirs if name not in ours]
    news += [f"gone: {name}" for name in ours if name not in theirs]
    for name in theirs.keys() & ours.keys():
        if theirs[name] != ours[name]:
            news.append(f"changed: {name}: {difference(ours[name], theirs[name])}")
    assert not news, f"timm has moved on. Run {SCRIPT.name} with it, and look at:\n" + "\n".join(
        sorted(news)
    )
    assert written.read_text() == (VARIANTS / written.name).read_text()


def difference(ours: Any, theirs: Any, path: str = "") -> str:
    """Where two rows differ."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return f"{path} {ours!r} -> {theirs!r}"
    if list(ours) != list(theirs) and ours.keys() == theirs.keys():
        return f"{path} order {list(ours)} -> {list(theirs)}"
    keys = [k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k)]
    return "; ".join(
        difference(ours.get(k), theirs.get(k), f"{path}.{k}".strip("."))
        for k in dict.fromkeys(keys)
    )


def test_every_architecture_and_checkpoint_of_timm_is_here(timm: dict[str, Any]) -> None:
    tags = {
        f"{name}.{tag}": facts
        for name, row in timm["architectures"].items()
        for tag, facts in row["tags"].items()
    }
    assert set(ALL) == set(timm["architectures"])
    assert set(tfimm_lora.list_models(include_tags=True)) >= set(tags)
    if timm["version"] == "1.0.31":
        weights = sum(facts["has_weights"] for facts in tags.values())
        assert (len(ALL), len(tags), weights) == (210, 457, 434)


def test_left_out_arguments_have_timms_defaults(timm: dict[str, Any]) -> None:
    """What a table leaves out is timm's default on that side and ours on this one."""
    for ours, theirs in (
        ("convnext_tiny", "ConvNeXt"),
        ("vit_base_patch16_224", "VisionTransformer"),
    ):
        defaults, compared = timm["defaults"][theirs], 0
        for field in dataclasses.fields(model_class(ours).cfg_class):
            spelling = RENAMED.get(field.name, field.name)
            if spelling in defaults and field.name not in NOT_DEFAULTS:
                expected = defaults[spelling]
                expected = "" if expected is None and field.default == "" else expected
                assert plain(field.default) == expected, field.name
                compared += 1
        assert compared >= 15
        assert (
            defaults["norm_layer"] is None
            and defaults["norm_eps" if theirs == "ConvNeXt" else "act_layer"] is None
        )


# --- Checkpoints ------------------------------------------------------------------------------


def check_facts(ours: tfimm_lora.PretrainedConfig, theirs: dict[str, Any]) -> None:
    """Compares every fact of a checkpoint that timm has."""
    theirs = {"has_weights": True, **theirs}
    for name, value in theirs.items():
        if name in UNUSED:
            assert not value, f"{name} is used now"
        elif name == "hf_hub_filename":
            assert ours.hf_hub_filename == (value or "model.safetensors")
        elif name not in NOT_KEPT:
            assert plain(getattr(ours, name)) == ("" if value is None else value) or (
                value is None and getattr(ours, name) is None
            ), f"{theirs['architecture']}.{theirs['tag']}: {name}"
    assert ours.url == ("" if theirs["hf_hub_id"] else theirs["url"] or "")


@pytest.mark.parametrize("name", ALL)
def test_facts_of_every_tag(name: str, timm: dict[str, Any]) -> None:
    row = timm["architectures"][name]
    listed = tfimm_lora.list_models(f"{name}.*", include_tags=True)
    assert set(listed) == {f"{name}.{tag}" for tag in row["tags"]}
    for tag, theirs in row["tags"].items():
        check_facts(pretrained_config(f"{name}.{tag}"), theirs)


@pytest.mark.parametrize("name", ALL)
def test_the_default_tag_is_timms(name: str, timm: dict[str, Any]) -> None:
    theirs = timm["architectures"][name]["default"]
    theirs["has_weights"] = bool(theirs["hf_hub_id"] or theirs["url"])
    check_facts(pretrained_config(name), theirs)
    config = tfimm_lora.models.model_config(name)
    assert config.nb_classes == theirs["num_classes"]
    assert [config.in_channels, *config.input_size] == theirs["input_size"]
    assert plain(config.classifier) == theirs["classifier"]
    assert config.first_conv == theirs["first_conv"] or config.stem_type != "patch"


def test_models_with_weights_are_timms(timm: dict[str, Any]) -> None:
    """Without those that exist only as a pickled file at some address."""
    expected = {
        f"{name}.{tag}"
        for name, row in timm["architectures"].items()
        for tag, facts in row["tags"].items()
        if facts["has_weights"] and facts["hf_hub_id"]
    }
    ours = tfimm_lora.list_models(pretrained=True, include_tags=True)
    assert {name for name in ours if name.split(".")[0] in ALL} == expected


def test_retired_names_resolve_as_in_timm(timm: dict[str, Any]) -> None:
    for old, new in timm["retired"].items():
        with pytest.warns(Warning, match="called"):
            ours = pretrained_config(old)
        if new is None:  # a slip in timm 1.0.31: these two names raise there
            assert old in ("vit_base_patch16_224_sam", "vit_base_patch32_224_sam")
            assert ours.tag == "sam_in1k"
        else:
            assert f"{ours.architecture}.{ours.tag}" == new, old
    assert len(timm["retired"]) == 43 or timm["version"] != "1.0.31"


def test_current_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in tfimm_lora.list_models(include_tags=True):
            pretrained_config(name)


# --- Preprocessing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "vit_tiny_patch16_224", "vit_small_patch14_dinov2"]
)
def test_preprocessing(name: str, timm: dict[str, Any]) -> None:
    """[0, 255] to (x / 255 - mean) / std."""
    facts = timm["architectures"][name]["default"]
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 4, 3)).astype("float32")
    expected = (images / 255 - facts["mean"]) / facts["std"]
    ours = np.asarray(tfimm_lora.create_preprocessing(name)(images))
    np.testing.assert_allclose(ours, expected, atol=2e-6)
