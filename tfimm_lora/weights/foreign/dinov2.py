"""DINOv2 as Meta publishes it, and TIPS v2, whose vision encoder is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.foreign.view import Format, Shape, Translation, below, renamed

_TIPS = "vision_encoder."
_SWIGLU = [(r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")]


def add_registers(to: Translation, registers: str, class_token: str, positions: str) -> None:
    """Adds class token, registers and positions of a DINOv2 with registers.

    There the class token has a row of the position table and the registers have none; in timm
    neither has, so that the row becomes part of the token.

    Args:
        to: Gets the recipes.
        registers: Name of the registers in the file.
        class_token: Name of the class token.
        positions: Name of the position table.
    """
    to.keep("reg_token", registers)
    shape = to.shapes.get(class_token, ())
    to.make("cls_token", [class_token, positions], shape, lambda token, p: token + p[:, :1])
    to.slice("pos_embed", positions, axis=1, start=1)


def _translate_below(to: Translation, prefix: str) -> None:
    names = below(to.shapes, prefix)
    names.pop("mask_token", None)  # of training
    if "register_tokens" in names:
        add_registers(
            to,
            *(prefix + name for name in ("register_tokens", "cls_token", "pos_embed")),
        )
        for name in ("register_tokens", "cls_token", "pos_embed"):
            names.pop(name, None)
    to.keep_all({new: names[old] for new, old in renamed(names, _SWIGLU).items()})


def _is_dinov2(shapes: Mapping[str, Shape]) -> bool:
    return "patch_embed.proj.weight" in shapes and bool(
        {"mask_token", "register_tokens"} & {*shapes}
    )


def _translate_dinov2(to: Translation, cfg: Any) -> None:
    _translate_below(to, "")


def _translate_tips(to: Translation, cfg: Any) -> None:
    _translate_below(to, _TIPS)  # the text encoder is not needed


DINOV2 = Format("DINOv2 of Meta", _is_dinov2, _translate_dinov2)
TIPS = Format("TIPS v2", lambda shapes: _TIPS + "mask_token" in shapes, _translate_tips)
