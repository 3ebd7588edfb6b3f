"""Feature maps against those of timm: ``features_only`` and ``forward_intermediates``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.cases import ALL, our_overrides, reduced, timm_case
from tests.parity.compare import TIMM_TOLERANCE, load, relative_error
from tfimm_lora.architectures.features import FeatureInfo
from tfimm_lora.models import create_feature_extractor, model_class, model_config

# Architectures, and what is changed about them: one for each thing that can go wrong.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("convnext_atto", {}),
    ("convnext_nano_ols", {"out_indices": [0, 2]}),
    ("convnext_tiny_hnf", {"out_indices": [1, 3], "norm": True}),
    ("convnext_tiny_hnf", {"norm": False}),
    ("convnextv2_atto", {"out_indices": [-1]}),
    ("test_convnext3", {"call_size": [100, 64], "out_indices": [0, 1, 2, 3]}),
    ("test_vit", {"out_indices": [0, -2]}),
    ("test_vit2", {"call_size": [80, 48]}),
    ("vit_small_patch14_reg4_dinov2", {"out_indices": [0, 2], "norm": True, "size": [70, 42]}),
    ("vit_base_patch16_siglip_224", {"out_indices": 2}),
    ("vit_base_patch16_siglip_gap_224", {"norm": True}),
    ("vit_base_patch32_clip_224", {"out_indices": [1], "norm": True}),
    ("deit_tiny_distilled_patch16_224", {"out_indices": [3, 7, 11], "norm": True}),
    ("beit3_base_patch16_224", {"out_indices": [0, 1, 2], "norm": True}),
    ("vit_pwee_patch16_reg1_gap_256", {"out_indices": [0, 2], "norm": True}),
    ("vit_dpwee_patch16_reg1_gap_256", {"out_indices": [-1]}),
    ("vit_mediumd_patch16_reg4_gap_256", {"out_indices": 1}),
    ("aimv2_large_patch14_224", {"out_indices": [0, 2], "norm": True}),
]


@pytest.fixture(scope="module")
def oracle(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """timm, asked for feature maps."""
    source = shared_dir / "oracle" / "timm_oracle.py"
    driver = Path(__file__).with_name("drive_timm_features.py")
    oracle = Oracle("timm_features", oracle_python, driver, [source], oracle_cache, [str(source)])
    with contextlib.closing(oracle):
        yield oracle


def request_of(facts: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A case's arguments for the oracle: three blocks of a large ViT are enough."""
    change = dict(change)
    request = reduced(facts)
    if "depth" in request["overrides"]:
        request["overrides"]["depth"] = 3
    request["img_size"] = change.pop("size", request["img_size"])
    return {**request, **change}


def loaded(case: Path, name: str) -> list[np.ndarray]:
    """All arrays of one kind."""
    return [load(case, f"{name}_{i}") for i in range(len(list(case.glob(f"{name}_*.npy"))))]


def largest_error(ours: list[Any], theirs: list[np.ndarray]) -> float:
    assert theirs
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_maps(
    name: str, change: dict, oracle: Oracle, zoo: dict[str, Any], record_property: Any
) -> None:
    facts = zoo["archs"][name]
    request = request_of(facts, change)
    fields = our_overrides(request)
    with timm_case(oracle, name, facts, request) as case:
        errors = errors_of(case, name, fields, change.get("out_indices"), change.get("norm", False))
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors


def errors_of(
    case: Path, name: str, fields: dict[str, Any], out_indices: Any, norm: bool
) -> dict[str, float]:
    """Our four ways to the maps of a case."""
    fields = {**fields, "model_path": case / "weights.safetensors"}
    x = load(case, "input")
    extractor = tfimm_lora.create_model(name, features_only=True, out_indices=out_indices, **fields)
    errors = {"features_only": largest_error(extractor(x), loaded(case, "maps"))}
    theirs = json.loads((case / "info.json").read_text())
    assert described(extractor.feature_info) == theirs

    model = tfimm_lora.create_model(name, **fields)
    vit = hasattr(model, "blocks")
    prefix = {"return_prefix_tokens": True} if vit else {}
    final, maps = model.forward_intermediates(x, out_indices, norm=norm, **prefix)
    if vit and model.cfg.num_prefix_tokens:
        tokens = [t for _, t in maps]
        maps = [m for m, _ in maps]
        errors["prefix"] = largest_error(tokens, loaded(case, "prefix"))
    errors["intermediates"] = largest_error(maps, loaded(case, "intermediates"))
    errors["final"] = largest_error([final], loaded(case, "final"))

    wrapped = create_feature_extractor(model, range_of(out_indices, maps), norm=norm)
    errors["wrapped"] = largest_error(wrapped(x), loaded(case, "intermediates"))
    return errors


def range_of(out_indices: Any, maps: list[Any]) -> Any:
    """``None`` means all for ``forward_intermediates``, and a default for an extractor."""
    return len(maps) if out_indices is None else out_indices


def described(info: FeatureInfo) -> dict[str, Any]:
    """What the oracle says about its extractor, said about ours."""
    return {
        "channels": info.channels(),
        "reduction": info.reduction(),
        "module": info.module_name(),
        "all": [[f["num_chs"], f["reduction"], f["module"]] for f in info],
    }


def test_facts_of_all_architectures(oracle: Oracle) -> None:
    """Channels, strides, names and default maps, which follow from the config alone."""
    theirs = json.loads((oracle.case("feature_info", archs=ALL) / "info.json").read_text())
    assert len(ALL) == len(theirs) == 210
    different = []
    for name in ALL:
        cls: Any = model_class(name)

        class WithoutLayers:
            cfg = model_config(name)
            feature_info = cls.feature_info
            default_out_indices = cls.default_out_indices

        model = WithoutLayers()
        if described(FeatureInfo(model.feature_info, model.default_out_indices)) != theirs[name]:
            different.append(name)
    assert not different
