"""Checkpoints in the names of others, and what timm or transformers make of them.

``drive_foreign.py ORACLE.py``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from foreign_layouts import LAYOUTS, as_pickled
from serve import load_module, serve

oracle = load_module(sys.argv[1])
torch = oracle.torch
torch.set_num_threads(1)


def _store(state: dict[str, Any], out: str, dtype: str) -> dict[str, Any]:
    """Saves and returns a state dict in a type."""
    stored = {
        k: v.to(getattr(torch, dtype)).contiguous() if v.is_floating_point() else v
        for k, v in state.items()
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    oracle.save_file(stored, Path(out, "foreign.safetensors"))
    return stored


def make(
    out: str,
    arch: str,
    layout: str,
    overrides: dict[str, Any] | None = None,
    img_size: Any = None,
    new_size: Any = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Random weights in a foreign layout, and what timm's loader makes a model of them answer.

    ``img_size`` is the size that the weights are for, ``new_size`` that of the loaded model.
    """
    source, x, meta = oracle.build(arch, 0, overrides, img_size)
    foreign = _store(LAYOUTS[layout](source.state_dict()), out, dtype)
    arguments = dict(overrides or {})
    size = new_size or img_size
    if hasattr(source, "patch_embed"):
        arguments["img_size"] = size
    overlay = {
        "state_dict": as_pickled(layout, foreign),
        "input_size": tuple(meta["input_size"]),
        "num_classes": meta["num_classes"],
    }
    arguments.setdefault("num_classes", meta["num_classes"])
    model = oracle.timm.create_model(
        arch, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    ).eval()
    x = torch.randn((2, 3, *size), generator=oracle._stream(0, "input"))
    return oracle._save(model, x, meta, out, fp64=False)


def transformers_model(
    out: str, model: str, config: dict[str, Any], size: int, dtype: str = "float32"
) -> dict[str, Any]:
    """A model of the library transformers with random weights, its files and its answers."""
    import transformers

    cls = getattr(transformers, model)
    made = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(_value(name, parameter).to(getattr(torch, dtype)).float())
    Path(out).mkdir(parents=True, exist_ok=True)
    made.to(getattr(torch, dtype)).save_pretrained(out)
    made.float()
    x = torch.randn((2, 3, size, size), generator=oracle._stream(0, "input"))
    with torch.no_grad():
        answer = made(x, output_hidden_states=False)
    oracle.np.save(Path(out, "input.npy"), x.permute(0, 2, 3, 1).numpy())
    names = ("last_hidden_state", "pooler_output", "image_embeds", "logits")
    found = {n: getattr(answer, n) for n in names if getattr(answer, n, None) is not None}
    for name, value in found.items():
        oracle.np.save(Path(out, f"{name}.npy"), value.numpy())
    return {"outputs": sorted(found)}


def _value(name: str, parameter: Any) -> Any:
    """Values far from those of the start, so that nothing can be left out unseen."""
    gen, shape = oracle._stream(0, name), parameter.shape
    if "norm" in name and name.endswith("weight"):
        return torch.rand(shape, generator=gen) + 0.5
    if "grn" in name or name.endswith(("lambda1", "layer_scale_parameter")):
        return 0.3 + 0.5 * torch.rand(shape, generator=gen)
    if name.endswith("bias"):
        return oracle._normal(shape, 0.2, gen)
    if "token" in name or "position" in name or name.endswith(("class_embedding", "probe")):
        return oracle._normal(shape, 0.5, gen)
    return oracle._normal(shape, max(parameter[0].numel(), 1) ** -0.5, gen)


if __name__ == "__main__":
    serve({"make": make, "transformers_model": transformers_model})
