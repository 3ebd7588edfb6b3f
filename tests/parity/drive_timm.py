"""Runs timm models with random weights and saves what they answer: ``drive_timm.py ORACLE.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from serve import load_module, serve

oracle = load_module(sys.argv[1])
torch = oracle.torch
torch.set_num_threads(1)


# What a class stands for in timm has a name in a config.
CLASSES = {
    "mlp_layer": {"glu": "SwiGLUPacked", "swiglu": "SwiGLU"},
    "block_fn": {},
}


def with_classes(overrides: dict[str, Any] | None) -> dict[str, Any]:
    """Overrides in which names stand for timm's classes."""
    module = sys.modules["timm.models.vision_transformer"]
    layers = sys.modules["timm.layers"]
    found = dict(overrides or {})
    for key, names in CLASSES.items():
        if key in found:
            name = names.get(found[key], found[key])
            found[key] = getattr(module, name, None) or getattr(layers, name)
    return found


def make(
    out: str,
    arch: str,
    overrides: dict[str, Any] | None = None,
    img_size: Any = None,
    dtype: str = "float32",
    intermediates: bool = False,
    eps_probe: bool = False,
    call_size: Any = None,
    batch: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """One model; with another dtype its weights are rounded to it, computed with and stored so.

    ``call_size`` is the size of the images if it is not the size that the model was built for.
    """
    model, x, meta = oracle.build(arch, seed, with_classes(overrides), img_size, batch, eps_probe)
    if call_size is not None:
        x = torch.randn((batch, x.shape[1], *call_size), generator=oracle._stream(seed, "input"))
    stored = getattr(torch, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored).float())
    meta = oracle._save(model, x, meta, out, intermediates, fp64=False)
    if dtype != "float32":
        state = {k: v.to(stored).contiguous() for k, v in model.state_dict().items()}
        oracle.save_file(state, Path(out, "weights.safetensors"))
    return meta


def adapt(out: str, arch: str, source: str, **arguments: Any) -> dict[str, Any]:
    """What timm's loader makes of the weights of a case for another size, channels or classes."""
    return oracle.adapt(arch, source, out, **arguments)


def hub_folder(out: str, arch: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """What timm would push to the hub, with an input and the logits beside it."""
    model, x, meta = oracle.build(arch, 0, overrides)
    meta = oracle._save(model, x, meta, out, fp64=False)
    oracle.timm.models.save_for_hf(model, out, safe_serialization=True)
    Path(out, "weights.safetensors").unlink()
    return meta


def load(
    out: str,
    arch: str,
    weights: str,
    inputs: str,
    overrides: dict[str, Any] | None = None,
    img_size: Any = None,
) -> dict[str, Any]:
    """Loads a file strictly into a model and writes its logits."""
    state = oracle.load_file(weights)
    size = {"img_size": tuple(img_size)} if img_size and "convnext" not in arch else {}
    model = oracle.timm.create_model(arch, **size, **(overrides or {})).eval()
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    images = torch.from_numpy(oracle.np.load(inputs)).permute(0, 3, 1, 2)
    with torch.no_grad():
        oracle.np.save(out, model(images).numpy())
    return {"dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})}


if __name__ == "__main__":
    serve({"make": make, "adapt": adapt, "load": load, "hub_folder": hub_folder})
