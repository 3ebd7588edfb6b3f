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


if __name__ == "__main__":
    serve({"generate": generate, "verify": verify, "count": count})
