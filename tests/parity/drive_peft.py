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


def names() -> list[str]:
    """The oracle's cases."""
    return list(oracle.CASES)


def count_kind(arch: str, nb_classes: int, kind: str, **fields: Any) -> str:
    """The line that PEFT prints for a config of any of its classes (``LoHaConfig``)."""
    model = oracle.timm.create_model(arch, num_classes=nb_classes)
    model = oracle.get_peft_model(model, getattr(oracle.peft, kind)(**fields))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    return printed.getvalue().strip()


def targeted(arch: str, kind: str, fields: dict[str, Any], **model: Any) -> dict[str, Any]:
    """The modules that PEFT adapts, by the config alone, or the error that it raises."""
    model = oracle.timm.create_model(arch, **model)
    try:
        config = getattr(oracle.peft, kind)(**fields)
        adapted = oracle.get_peft_model(model, config)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, oracle.BaseTunerLayer) and hasattr(module, "base_layer")
    }
    rank = getattr(config, "r", None)
    ranks = {}
    for name, module in adapted.named_modules():
        if name.removeprefix("base_model.model.") in found and hasattr(module, "r"):
            ranks[name.removeprefix("base_model.model.")] = module.r["default"]
    saved = {**adapted.peft_config["default"].to_dict(), "peft_type": config.peft_type.value}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()}
    config_now = {k: v for k, v in plain.items() if isinstance(v, (str, int, float, list, dict))}
    return {"modules": sorted(found), "ranks": ranks, "r": rank, "config": config_now}


def adalora_trace(out: str) -> dict[str, Any]:
    """PEFT's rank allocator, fed with recorded gradients for twenty steps."""
    return {"log": oracle.adalora_trace(out)["log"]}


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


def adapted_layer(
    out: str, weights: str, inputs: str, kind: str, config: dict[str, Any]
) -> dict[str, Any]:
    """A linear layer or a convolution with an adapter of a given kind: outputs, and merged ones."""
    np, torch, peft = oracle.np, oracle.torch, oracle.peft
    from peft.tuners.boft import layer as boft

    class BlockDiagonal:
        """What PEFT's CUDA extension does, so that butterflies have several factors."""

        @staticmethod
        def apply(blocks: Any) -> Any:
            return torch.stack([torch.block_diag(*torch.unbind(b)) for b in blocks])

    before = boft.get_fbd_cuda, boft.FastBlockDiag
    boft.get_fbd_cuda, boft.FastBlockDiag = (lambda: True), BlockDiagonal
    try:
        with np.load(weights) as archive:
            values = {k: torch.from_numpy(v) for k, v in archive.items()}
        shape = values["weight"].shape
        linear = len(shape) == 2
        create = torch.nn.Linear if linear else torch.nn.Conv2d
        layer = create(shape[1], shape[0], *([] if linear else [shape[2:]]))
        layer.load_state_dict({k: values[k] for k in ("weight", "bias")}, strict=True)
        made = getattr(peft, f"{kind}Config")(target_modules=["0"], **config)
        model = oracle.get_peft_model(torch.nn.Sequential(layer), made).eval()
        tensors = {
            k.replace("adapter.", "base_model.model.0."): v
            for k, v in values.items()
            if k.startswith("adapter.")
        }
        wanted = set(oracle.get_peft_model_state_dict(model))
        assert wanted == set(tensors), (wanted, set(tensors))
        oracle.set_peft_model_state_dict(model, tensors)
        x = torch.from_numpy(np.load(inputs))
        x = x if linear else x.permute(0, 3, 1, 2)
        with torch.no_grad():
            answers = {"adapter": model(x), "merged": model.merge_and_unload()(x)}
        np.savez(
            out, **{k: (v if linear else v.permute(0, 2, 3, 1)).numpy() for k, v in answers.items()}
        )
    finally:
        boft.get_fbd_cuda, boft.FastBlockDiag = before
    return {}


def eva(
    case: str, out: str, images: str, r: int, rho: float, target_modules: Any
) -> dict[str, Any]:
    """A of every module as PEFT's EVA initialises it from images."""
    np, torch, peft = oracle.np, oracle.torch, oracle.peft
    base = oracle.build_base("vit")
    base.load_state_dict(oracle.load_file(f"{case}/base.safetensors"), strict=True)
    config = oracle.LoraConfig(
        r=r,
        target_modules=target_modules,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.9999),
    )
    model = oracle.get_peft_model(base, config)
    batch = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2).contiguous()
    found = peft.get_eva_state_dict(
        model,
        [batch],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    prefix = "base_model.model."
    np.savez(out, **{k.removeprefix(prefix): v.numpy() for k, v in found.items()})
    return {}


if __name__ == "__main__":
    serve(
        {
            "generate": generate,
            "verify": verify,
            "names": names,
            "count": count,
            "count_kind": count_kind,
            "targeted": targeted,
            "adalora_trace": adalora_trace,
            "convolution": convolution,
            "adapted_layer": adapted_layer,
            "eva": eva,
        }
    )
