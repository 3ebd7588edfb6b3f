"""Which ConvNeXt, ViT and DeiT models tfimm 0.2.14 has, and which public names and fields."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import tfimm
import tfimm.layers
import tfimm.utils
from serve import serve
from tfimm.architectures import convnext, lora, vit
from tfimm.models import model_config


def models(out: str) -> None:
    """Writes what tfimm's configurations say about the weights, by name, to ``models.json``."""
    answer: dict[str, dict[str, Any]] = {
        name: {
            "url": model_config(name).url,
            "num_classes": model_config(name).nb_classes,
            "input_size": [model_config(name).in_channels, *model_config(name).input_size],
            "mean": model_config(name).mean,
            "std": model_config(name).std,
        }
        for module in ("convnext", "vit")
        for name in tfimm.list_models(module=module)
    }
    Path(out).mkdir()
    Path(out, "models.json").write_text(json.dumps(answer))


def public(module: Any) -> list[str]:
    """Names that a module of tfimm's gives out, other modules left out."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]


def interface(out: str) -> None:
    """Writes tfimm's public names by module, and its configs' fields, to ``interface.json``."""
    answer = {
        module.__name__: public(module)
        for module in (tfimm, tfimm.models, tfimm.utils, tfimm.layers, lora)
    }
    for module in (convnext, vit):  # without the functions that are models
        answer[module.__name__] = [n for n in module.__all__ if not tfimm.models.is_model(n)]
    for config in (convnext.ConvNeXtConfig, vit.ViTConfig, lora.LoRAConvNeXtConfig):
        answer[config.__name__] = [field.name for field in dataclasses.fields(config)]
    Path(out).mkdir()
    Path(out, "interface.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    serve({"models": models, "interface": interface})
