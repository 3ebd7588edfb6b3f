"""Runs timm's transforms on pictures: ``drive_transforms.py TORCHVISION_FOLDER``.

timm's transforms are torchvision's, whose compiled operators are for another build of torch than
the one here. The transforms of pictures need none of them, so two are declared, without which
torchvision does not import.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve import serve

sys.path.insert(0, sys.argv[1])
try:
    import torchvision
except RuntimeError:  # "operator torchvision::nms does not exist"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.models import get_arch_pretrained_cfgs

torch.set_num_threads(1)


def settings(modules: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What timm resolves for every tag, for the size of training and for the size of testing."""
    return {
        name: [
            resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=test)
            for test in (False, True)
        ]
        for module in modules
        for architecture in timm.list_models(module=module)
        for name, cfg in get_arch_pretrained_cfgs(architecture).items()
    }


def evaluate(pictures: dict[str, str], out: str, options: dict[str, Any]) -> list[str]:
    """Writes what timm's evaluation transform makes of pictures, as bytes and normalised."""
    for name, path in pictures.items():
        picture = Image.open(path).convert("RGB")
        pixels = create_transform(**options, normalize=False)(picture)
        values = create_transform(**options)(picture)
        np.save(Path(out, f"{name}.pixels.npy"), pixels.permute(1, 2, 0).numpy())
        np.save(Path(out, f"{name}.values.npy"), values.permute(1, 2, 0).numpy())
    return sorted(pictures)


def crops(height: int, width: int, count: int) -> list[list[int]]:
    """Boxes that timm's random crop draws: top, left, height, width."""
    random.seed(0)
    picture = Image.new("L", (width, height))
    draw = RandomResizedCropAndInterpolation.get_params
    return [list(draw(picture, (0.08, 1.0), (3 / 4, 4 / 3))) for _ in range(count)]


if __name__ == "__main__":
    serve({"settings": settings, "evaluate": evaluate, "crops": crops})
