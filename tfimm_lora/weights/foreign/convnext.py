"""ConvNeXt and ConvNeXt V2 as Meta publishes them: ``downsample_layers.``."""

from __future__ import annotations

import re
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Translation, renamed

_RULES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
# Parts for distillation in EUPE.
_UNUSED = ("projectors.", "norms.")


def add_convnext(to: Translation, names: dict[str, str], cfg: Any) -> None:
    """Adds the weights of a ConvNeXt whose names are timm's and whose shapes are Meta's.

    Args:
        to: Gets the recipes.
        names: timm names to names in the file.
        cfg: The model's config: its MLPs may be 1x1 convolutions, in the file they are dense.
    """
    for name, source in names.items():
        shape = to.shapes[source]
        if ".mlp.grn." in name:
            to.reshape(name, source, shape[-1:])  # (1, 1, 1, channels) in the file
        elif re.search(r"\.mlp\.fc[12]\.weight$", name) and len(shape) == 2 and cfg.conv_mlp:
            to.reshape(name, source, (*shape, 1, 1))
        else:
            to.keep(name, source)


def _translate(to: Translation, cfg: Any) -> None:
    used = [n for n in to.shapes if not n.startswith(_UNUSED)]
    add_convnext(to, renamed(used, _RULES), cfg)


CONVNEXT = Format(
    "ConvNeXt of Meta", lambda shapes: "downsample_layers.0.0.weight" in shapes, _translate
)
