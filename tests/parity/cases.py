"""Which models are compared, and how each is made small enough for a test.

The facts of timm's architectures come from ``shared/reference/timm_zoo.json``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tfimm_lora
from tests.oracles import Oracle

ALL = [
    name
    for module in ("convnext", "vision_transformer", "deit")
    for name in tfimm_lora.list_models(module=module)
]
"""Every architecture of the package, without those that tests register."""

FULL_DEPTH_PARAMETERS = 6_000_000
"""Models up to this size keep their depth."""

CACHED_PARAMETERS = 20_000_000
"""Cases of larger architectures are not kept on disk."""


def reduced(facts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The oracle's arguments for an architecture with few blocks and a small image.

    Widths, heads, kernels and norms stay as they are. Images are three by three patches for a ViT
    and 64 by 96 pixels for a ConvNeXt.
    """
    overrides: dict[str, Any] = {}
    if facts["module"] == "convnext":
        size: list[int] = [64, 96]
        if facts["params"] > FULL_DEPTH_PARAMETERS:
            overrides["depths"] = [1, 1, 2, 1]
    else:
        size = [3 * facts["kwargs"].get("patch_size", 16)] * 2
        if facts["params"] > FULL_DEPTH_PARAMETERS:
            overrides["depth"] = 2
    return {"img_size": size, "overrides": overrides, **changes}


@contextlib.contextmanager
def timm_case(
    oracle: Oracle, name: str, facts: dict[str, Any], request: dict[str, Any]
) -> Iterator[Path]:
    """The folder of a case, from the cache if the architecture is not too large for it."""
    if facts["params"] <= CACHED_PARAMETERS:
        yield oracle.case("make", arch=name, **request)
    else:
        with oracle.passing_case("make", arch=name, **request) as folder:
            yield folder


def our_overrides(request: dict[str, Any]) -> dict[str, Any]:
    """The same request as keyword arguments of ``tfimm_lora.create_model``."""
    return {**request["overrides"], "input_size": tuple(request["img_size"])}
