"""I-JEPA as Meta publishes it: an encoder beside predictor and target encoder."""

from __future__ import annotations

from typing import Any

from tfimm_lora.weights.foreign.view import Format, Translation, below

_PREFIX = "encoder.module."


def _translate(to: Translation, cfg: Any) -> None:
    to.keep_all(below(to.shapes, _PREFIX))


IJEPA = Format(
    "I-JEPA of Meta", lambda shapes: _PREFIX + "patch_embed.proj.weight" in shapes, _translate
)
