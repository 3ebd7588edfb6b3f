"""OpenCLIP with a vision tower of timm's: ``visual.trunk.``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.weights.foreign.view import Format, Shape, Translation, below

_TRUNK = "visual.trunk."


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    return any(name.startswith(_TRUNK) for name in shapes)


def _translate(to: Translation, cfg: Any) -> None:
    names = below(to.shapes, _TRUNK)  # the text tower is not needed
    if getattr(cfg, "global_pool", "map") != "map":
        # A SigLIP without attention pooling: its weights are left out, as in timm.
        names = {n: s for n, s in names.items() if not n.startswith("attn_pool.")}
    to.keep_all(names)
    classifier = classifier_paths(cfg)[0]
    heads = {"visual.head.proj.": classifier}
    if getattr(cfg, "head_hidden_size", None):
        heads = {"visual.head.mlp.fc1.": "head.pre_logits.fc", "visual.head.mlp.fc2.": classifier}
    for prefix, module in heads.items():
        to.keep_all({f"{module}.{leaf}": s for leaf, s in below(to.shapes, prefix).items()})
    # The projection into the space shared with texts has no bias.
    weight, bias = f"{classifier}.weight", f"{classifier}.bias"
    if weight in to.recipes and bias not in to.recipes:
        to.fill(bias, to.recipes[weight].shape[:1], 0.0)


OPEN_CLIP = Format("OpenCLIP with a tower of timm", _recognise, _translate)
