"""The embedded model: a small ViT that learned the digits 0 to 5, registered as ``vit_digits``.

Importing this file registers it. ``python -m tfimm_lora.training.pretrain_digits`` makes its
checkpoint, and ``vit_digits.json`` beside it records how that was done.
"""

from __future__ import annotations

from importlib import resources

from tfimm_lora.architectures import ViT, ViTConfig
from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.models import register_model
from tfimm_lora.training.config import EMBEDDED_MODEL as NAME

PRETRAINING_CLASSES = ("0", "1", "2", "3", "4", "5")
CHECKPOINT = resources.files("tfimm_lora.training").joinpath(f"{NAME}.safetensors")


@register_model
def vit_digits() -> tuple[type, ViTConfig, dict[str, PretrainedConfig]]:
    """ViT of 6 blocks of width 96 on grey images of 32 × 32 pixels in 16 patches.

    Example:
        >>> tfimm_lora.create_model("vit_digits", pretrained=True, nb_classes=4)
    """
    config = ViTConfig(
        name=NAME,
        nb_classes=len(PRETRAINING_CLASSES),
        in_channels=1,
        input_size=(32, 32),
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=3,
    )
    facts = PretrainedConfig(
        architecture=NAME,
        tag="digits_0_to_5",
        file=str(CHECKPOINT),
        num_classes=len(PRETRAINING_CLASSES),
        input_size=(1, 32, 32),
        fixed_input_size=True,
        mean=(0.5,),
        std=(0.5,),
        interpolation="bicubic",
        crop_pct=1.0,
        first_conv=config.first_conv,
        classifier=config.classifier,
        license="apache-2.0",
    )
    return ViT, config, {facts.tag: facts}
