"""AIMv2 as Apple publishes it: ``preprocessor.`` and ``trunk.``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.weights.foreign.view import Format, Translation, renamed

_RULES = [
    (r"^preprocessor\.patchifier\.", "patch_embed."),
    (r"^preprocessor\.pos_embed$", "pos_embed"),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.", ""),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.fc1_g."),  # the gate of SwiGLU
    (r"\.mlp\.fc3\.", ".mlp.fc1_x."),
]


def _translate(to: Translation, cfg: Any) -> None:
    to.keep_all(renamed(to.shapes, _RULES))


AIMV2 = Format(
    "AIMv2 of Apple",
    lambda shapes: "preprocessor.patchifier.proj.weight" in shapes,
    _translate,
)
