"""timm's own first vision transformers: flat patch kernels, a layer in front of the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Shape, Translation

_KERNEL = "patch_embed.proj.weight"


def _recognise(shapes: Mapping[str, Shape]) -> bool:
    flat = len(shapes.get(_KERNEL, (0,) * 4)) == 2
    return _KERNEL in shapes and (flat or any(n.startswith("pre_logits.") for n in shapes))


def _translate(to: Translation, cfg: Any) -> None:
    for name, shape in to.shapes.items():
        if name == _KERNEL and len(shape) == 2:
            patch = cfg.patch_size
            to.reshape(name, name, (shape[0], shape[1] // patch**2, patch, patch))
        elif not name.startswith("pre_logits."):  # left out by timm as well
            to.keep(name, name)


EARLY_TIMM = Format("ViT of timm's first versions", _recognise, _translate)
