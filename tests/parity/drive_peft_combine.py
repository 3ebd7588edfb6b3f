"""Combines and swaps adapters in PEFT: ``drive_peft_combine.py ORACLE.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from serve import load_module, serve

oracle = load_module(sys.argv[1])
oracle.torch.set_num_threads(1)


def _base(case: str) -> tuple[Any, Any]:
    """A case's base model and its images."""
    meta = json.loads(Path(case, "meta.json").read_text())
    model = oracle.build_base(meta["arch"], meta["seed"])
    model.load_state_dict(oracle.load_file(Path(case, "base.safetensors")), strict=True)
    return model, oracle.np.load(Path(case, "input.npy"))


def combine(case: str, out: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Logits of a weighted case's sources, combined in another way."""
    base, images = _base(case)
    folders = [str(Path(case, f"source_{letter}")) for letter in "ab"]
    model = oracle.PeftModel.from_pretrained(base, folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    weights = json.loads(Path(case, "meta.json").read_text())["weighted"]["weights"]
    model.add_weighted_adapter(["a", "b"], weights, "combo", **arguments)
    model.set_adapter("combo")
    oracle.np.save(Path(out, "logits.npy"), oracle.run(model.eval(), images))
    return {"rank": model.peft_config["combo"].r}


def second(case: str, out: str, weights: list[float]) -> None:
    """Another adapter of a case's kind, saved as ``second``, and both combined."""
    base, images = _base(case)
    config = oracle.CASES[Path(case).name.removeprefix("peft-").rpartition("-")[0]].config()
    model = oracle.PeftModel.from_pretrained(base, str(Path(case, "adapter")), adapter_name="a")
    model.add_adapter("second", config)
    oracle.randomize_adapter(model, "another seed", adapter="second")
    model.save_pretrained(out, selected_adapters=["second"])
    model.add_weighted_adapter(["a", "second"], weights, "combo")
    model.set_adapter("combo")
    oracle.np.save(Path(out, "logits.npy"), oracle.run(model.eval(), images))


def hotswap(case: str, out: str) -> None:
    """PEFT's hot-swap of a case's adapter by itself: logits before and after."""
    from peft.utils.hotswap import hotswap_adapter

    base, images = _base(case)
    model = oracle.PeftModel.from_pretrained(base, str(Path(case, "adapter"))).eval()
    before = oracle.run(model, images)
    hotswap_adapter(model, str(Path(case, "adapter")), "default")
    oracle.np.savez(Path(out, "hotswap.npz"), before=before, after=oracle.run(model, images))


if __name__ == "__main__":
    serve({"combine": combine, "second": second, "hotswap": hotswap})
