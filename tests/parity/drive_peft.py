"""Makes adapters with PEFT and loads ours with it: ``drive_peft.py ORACLE.py``."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from serve import load_module, serve

oracle = load_module(sys.argv[1])
oracle.torch.set_num_threads(1)


def generate(out: str, name: str) -> dict[str, Any]:
    """One of the oracle's cases: base weights, adapter, logits, gradients, merged weights."""
    return {"trainable": oracle.generate(name, out)["trainable"]}


def verify(case: str, adapter: str, logits: str) -> dict[str, Any]:
    """Loads an adapter over a case's base weights and compares the logits."""
    return oracle.verify(case, adapter, logits)


def count(arch: str, nb_classes: int, **lora: Any) -> str:
    """The line that PEFT prints for a timm model."""
    model = oracle.timm.create_model(arch, num_classes=nb_classes)
    model = oracle.get_peft_model(model, oracle.LoraConfig(**lora))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    return printed.getvalue().strip()


def convolution(
    out: str, weights: str, inputs: str, bias: bool, stride: int, groups: int, **lora: Any
) -> dict[str, Any]:
    """A convolution with an adapter whose weights are given: outputs, merged if PEFT can merge."""
    np, torch = oracle.np, oracle.torch
    with np.load(weights) as archive:
        values = {k: torch.from_numpy(v) for k, v in archive.items()}
    filters, channels, height, width = values["weight"].shape
    layer = torch.nn.Conv2d(
        channels * groups, filters, (height, width), stride, groups=groups, bias=bias
    )
    base = {k: values[k] for k in ("weight", "bias") if k in values}
    layer.load_state_dict(base, strict=True)
    config = oracle.LoraConfig(target_modules=["0"], **lora)
    model = oracle.get_peft_model(torch.nn.Sequential(layer), config)
    factors = {f"base_model.model.0.{k}.weight": values[k] for k in ("lora_A", "lora_B")}
    loaded = oracle.set_peft_model_state_dict(model, factors)
    images = torch.from_numpy(np.load(inputs)).permute(0, 3, 1, 2)
    with torch.no_grad():
        results = {"adapter": model(images).permute(0, 2, 3, 1).numpy()}
        if groups == 1:
            merged = model.merge_and_unload()
            results["merged"] = merged(images).permute(0, 2, 3, 1).numpy()
            results["kernel"] = merged[0].weight.permute(2, 3, 1, 0).numpy()
    np.savez(out, **results)
    return {"unexpected": list(loaded.unexpected_keys)}


if __name__ == "__main__":
    serve({"generate": generate, "verify": verify, "count": count, "convolution": convolution})
