"""Checkpoints that are not in timm's names: one file per format, registered in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.architectures import ConvNeXtConfig, ViTConfig
from tfimm_lora.weights.foreign.aimv2 import AIMV2
from tfimm_lora.weights.foreign.beit3 import BEIT3
from tfimm_lora.weights.foreign.clip import CLIP
from tfimm_lora.weights.foreign.convnext import CONVNEXT
from tfimm_lora.weights.foreign.deit3 import DEIT3
from tfimm_lora.weights.foreign.dinov2 import DINOV2, TIPS
from tfimm_lora.weights.foreign.early_timm import EARLY_TIMM
from tfimm_lora.weights.foreign.hf_clip import HF_CLIP, HF_SIGLIP
from tfimm_lora.weights.foreign.hf_convnext import HF_CONVNEXT
from tfimm_lora.weights.foreign.hf_dinov2 import HF_DINOV2
from tfimm_lora.weights.foreign.hf_vit import HF_VIT
from tfimm_lora.weights.foreign.ijepa import IJEPA
from tfimm_lora.weights.foreign.open_clip import OPEN_CLIP
from tfimm_lora.weights.foreign.radio import RADIO
from tfimm_lora.weights.foreign.unwrap import unwrapped
from tfimm_lora.weights.foreign.view import Format, Shape, TensorFile, TranslatedFile, Translation

FORMATS: dict[type, tuple[Format, ...]] = {
    ConvNeXtConfig: (CONVNEXT, OPEN_CLIP, HF_CONVNEXT),
    ViTConfig: (
        CLIP, OPEN_CLIP, DINOV2, TIPS, DEIT3, BEIT3, IJEPA, AIMV2, RADIO, HF_VIT, HF_DINOV2,
        HF_CLIP, HF_SIGLIP, EARLY_TIMM,
    ),
}  # fmt: skip
"""The formats that can be read for models of a config class."""


def formats_of(cfg: Any) -> tuple[Format, ...]:
    """Returns the formats that can be read for a model with this config.

    Example:
        >>> titles = [f.title for f in formats_of(tfimm_lora.models.model_config("test_vit"))]
    """
    return next((formats for cls, formats in FORMATS.items() if isinstance(cfg, cls)), ())


def recognised(shapes: Mapping[str, Shape], cfg: Any) -> Format | None:
    """Returns the format of a file's tensors, ``None`` if it is timm's or an unknown one."""
    return next((f for f in formats_of(cfg) if f.recognise(shapes)), None)


def in_timm_names(file: TensorFile, cfg: Any) -> TensorFile:
    """Reads a file of a known foreign format as if it had timm's names.

    Formats are recognised by the names of the tensors, never by that of the file. Nothing is read
    until a weight is asked for, and then only what it is made of.

    Args:
        file: An open file.
        cfg: Config of the model that the weights are for.

    Returns:
        A view of the file under timm's names, or the file itself if its names are timm's or
        unknown.

    Raises:
        ValueError: The file is of a known format but lacks a part of a weight, or has it in
            another shape.

    Example:
        >>> with read_safetensors("dinov2.safetensors") as file:
        ...     shape = in_timm_names(file, model.cfg).shapes["pos_embed"]
    """
    if not formats_of(cfg):
        return file
    names = unwrapped(file.shapes)
    shapes = {bare: file.shapes[name] for bare, name in names.items()}
    bare_file = file
    if any(bare != name for bare, name in names.items()):
        unwrapping = Translation(file.shapes)
        unwrapping.keep_all(names)
        bare_file = TranslatedFile(file, unwrapping, "a wrapped checkpoint")
    found = recognised(shapes, cfg)
    if found is None:
        return bare_file
    to = Translation(shapes)
    try:
        found.translate(to, cfg)
    except ValueError as error:
        raise ValueError(f"{file.path} looks like {found.title}, but {error}.") from error
    except IndexError as error:
        raise ValueError(
            f"{file.path} looks like {found.title}, but a tensor has fewer axes than there."
        ) from error
    return TranslatedFile(bare_file, to, found.title)


def described(file: TensorFile) -> str:
    """Names a file in messages, with what it was recognised as."""
    origin = getattr(file, "origin", "")
    return f"{file.path}, read as {origin}," if origin else str(file.path)


def known_formats(cfg: Any) -> str:
    """A sentence for messages: which formats can be read for a model with this config."""
    titles = [f.title for f in formats_of(cfg)]
    return f"Apart from timm's names, these are read: {'; '.join(titles)}." if titles else ""
