"""Models of the library transformers: their files and their answers. ``drive_transformers.py``"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from serve import serve

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make(
    out: str, name: str, config: dict[str, Any], size: int, part: str = "", dtype: str = "float32"
) -> dict[str, Any]:
    """A model with random weights.

    ``name`` is its class; ``part`` names the submodule whose answers are meant, where the whole
    model wants more inputs or answers something else.
    """
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    stored = getattr(torch, dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_value(key, parameter).to(stored))
    model.to(stored).save_pretrained(out)
    model.float()
    x = torch.randn((2, 3, size, size), generator=_stream("input"))
    options = {}
    if "MAE" in name:  # it shuffles patches by this noise: in ascending order it does not
        options["noise"] = torch.arange((size // config["patch_size"]) ** 2)[None].repeat(2, 1)
    with torch.no_grad():
        answer = model.get_submodule(part)(x, **options)
    np.save(Path(out, "input.npy"), x.permute(0, 2, 3, 1).numpy())
    names = ("last_hidden_state", "pooler_output", "image_embeds", "logits")
    found = {n: getattr(answer, n) for n in names if getattr(answer, n, None) is not None}
    for key, value in found.items():
        np.save(Path(out, f"{key}.npy"), value.numpy())
    return {"outputs": sorted(found)}


def _stream(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _value(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Values far from those of the start, so that nothing can be left out unseen."""
    shape, generator = parameter.shape, _stream(name)
    normal = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 0.5 + torch.rand(shape, generator=generator)
    if "grn" in name or name.endswith(("lambda1", "layer_scale_parameter")):
        return 0.3 + 0.5 * torch.rand(shape, generator=generator)
    if name.endswith("bias"):
        return 0.2 * normal
    if "token" in name or "position" in name or name.endswith(("class_embedding", "probe")):
        return 0.5 * normal
    return normal / max(parameter[0].numel(), 1) ** 0.5 if shape else normal


def adapter(
    out: str, name: str, config: dict[str, Any], size: int, kind: str, fields: dict[str, Any]
) -> dict[str, Any]:
    """A model with random weights and an adapter of PEFT's, with random weights as well."""
    import peft

    made = make(out, name, config, size)
    model = getattr(transformers, name).from_pretrained(out)
    model = peft.get_peft_model(model, getattr(peft, kind)(**fields)).eval()
    values = peft.get_peft_model_state_dict(model)
    for key, value in values.items():
        noise = torch.randn(value.shape, generator=_stream(key))
        if "vera_A" not in key and "vera_B" not in key:
            values[key] = value + 0.2 * noise
    peft.set_peft_model_state_dict(model, values)
    model.save_pretrained(str(Path(out, "adapter")))
    x = torch.from_numpy(np.load(Path(out, "input.npy"))).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.save(Path(out, "logits_adapter.npy"), model(x).logits.numpy())
    return {**made, "keys": sorted(values)}


if __name__ == "__main__":
    serve({"make": make, "adapter": adapter})
