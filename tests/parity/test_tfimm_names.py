"""tfimm's names: of its ConvNeXt, ViT and DeiT models, of its calls and of its fields."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.test_timm_facts import oracle, timm  # noqa: F401  fixtures
from tfimm_lora.models import pretrained_config

VARIANTS = Path(tfimm_lora.__file__).parent / "architectures" / "variants"
CHECKPOINTS = json.loads((VARIANTS / "tfimm_names.json").read_text())
"""The checkpoint, ``arch.tag``, that tfimm's weights are, by tfimm's name."""

# Facts that differ, (tfimm's, timm's today). tfimm divides by 0 with MIIL's; timm has removed the
# zeroed classifiers of two ImageNet-21k models; one model never had weights with 1000 classes.
DIFFERENT = {
    "vit_base_patch16_224_miil": {"std": ([0.0] * 3, [1.0] * 3)},
    "vit_base_patch16_224_miil_in21k": {"std": ([0.0] * 3, [1.0] * 3)},
    "vit_huge_patch14_224_in21k": {"num_classes": (21843, 0)},
    "vit_large_patch32_224_in21k": {"num_classes": (21843, 0)},
    "vit_large_patch32_224": {"num_classes": (1000, 0)},
}

# Names that timm still has, with another checkpoint as default than it had when tfimm took it.
OTHER_DEFAULT = {
    "convnext_tiny": "in12k_ft_in1k",
    "convnext_small": "in12k_ft_in1k",
    "convnext_base": "fb_in22k_ft_in1k",
    "convnext_large": "fb_in22k_ft_in1k",
    "vit_base_patch8_224": "augreg2_in21k_ft_in1k",
    "vit_base_patch16_224": "augreg2_in21k_ft_in1k",
    "vit_base_patch16_224_miil": "in21k",
    "vit_large_patch32_224": "orig_in21k",
}


@pytest.fixture(scope="module")
def tfimm(tfimm_python: Any, oracle_cache: Path) -> Iterator[Oracle]:
    """tfimm's registry and interface; see ``drive_tfimm_names.py``."""
    script = Path(__file__).with_name("drive_tfimm_names.py")
    found = Oracle(
        "tfimm_names", tfimm_python.python, script, [], oracle_cache, env=tfimm_python.env
    )
    with contextlib.closing(found):
        yield found


@pytest.fixture(scope="module")
def theirs(tfimm: Oracle) -> dict[str, dict[str, Any]]:
    """What tfimm says about its models, by name."""
    return json.loads((tfimm.case("models") / "models.json").read_text())


def test_all_names_are_here(theirs: dict[str, Any]) -> None:
    assert theirs.keys() == CHECKPOINTS.keys()
    assert len(theirs) == 55


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_facts_of_the_checkpoint(name: str, theirs: dict[str, Any]) -> None:
    facts = pretrained_config(CHECKPOINTS[name])
    found = {
        "num_classes": facts.num_classes,
        "input_size": list(facts.input_size),
        "mean": list(facts.mean),
        "std": list(facts.std),
    }
    different = {k: (theirs[name][k], v) for k, v in found.items() if theirs[name][k] != v}
    assert different == DIFFERENT.get(name, {})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_resolve_as_in_timm(name: str, timm: dict[str, Any]) -> None:  # noqa: F811
    """To tfimm's checkpoint; a name that timm has today, to that which timm means by it today."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = pretrained_config(name)
    ours = f"{facts.architecture}.{facts.tag}"
    if name in timm["architectures"]:
        assert not caught
        assert facts.tag == timm["architectures"][name]["default"]["tag"]
        expected = OTHER_DEFAULT.get(name)
        meant = f"{name}.{expected}" if expected else CHECKPOINTS[name]
    else:
        assert [str(w.message) for w in caught] == [f"Model {name!r} is called {ours!r} now."]
        meant = CHECKPOINTS[name]
        assert timm["retired"].get(name) in (None, meant)
    assert ours == meant


# --- docs/coming_from_tfimm.md ----------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "coming_from_tfimm.md"


def test_the_guide_lists_the_other_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+\.\w+)` \|$", GUIDE.read_text(), re.MULTILINE)
    assert dict(rows) == {n: CHECKPOINTS[n] for n in OTHER_DEFAULT if "." in CHECKPOINTS[n]}


def test_the_guide_lists_every_name_of_tfimms_interface(tfimm: Oracle) -> None:
    interface = json.loads((tfimm.case("interface") / "interface.json").read_text())
    # The first column of the tables: what something was called in tfimm.
    rows = re.findall(r"^\| (.+?) \| .+ \|$", GUIDE.read_text(), re.MULTILINE)
    listed = {
        word
        for row in rows
        for code in re.findall(r"`(.+?)`", row)
        for word in re.findall(r"\w+", code)
    }
    assert len(interface) == 10 and all(interface.values())
    missing = {part: sorted(set(names) - listed) for part, names in interface.items()}
    assert not {part: names for part, names in missing.items() if names}
