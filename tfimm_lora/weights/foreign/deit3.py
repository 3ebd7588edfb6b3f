"""DeiT III as Meta publishes it: layer scales are ``gamma_1`` and ``gamma_2`` of a block."""

from __future__ import annotations

from typing import Any

from tfimm_lora.weights.foreign.view import Format, Translation, renamed


def _translate(to: Translation, cfg: Any) -> None:
    to.keep_all(renamed(to.shapes, [(r"\.gamma_([12])$", r".ls\1.gamma")]))


DEIT3 = Format(
    "DeiT III of Meta",
    lambda shapes: {"blocks.0.gamma_1", "blocks.0.attn.qkv.weight"} <= set(shapes),
    _translate,
)
