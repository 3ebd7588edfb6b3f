"""PEFT's cases as models of ours, PEFT's names for our weights, and gradients on any backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfimm_lora
from tests.parity.compare import load_meta, timm_key, torch_layout
from tfimm_lora import lora

PLAIN = [
    "lora-vit-qkv",
    "lora-vit-all-linear",
    "lora-vit-regex",
    "lora-vit-layers",
    "lora-vit-exclude",
    "rslora-vit",
    "lora-vit-gaussian-init",
    "lora-vit-rank-pattern",
    "lora-vit-bias-lora-only",
    "lora-vit-bias-all",
    "lora-vit-head",
    "lora-vit-head-bias-all",
    "lora-vit-patch-embed",
    "lora-vit-orthogonal",
    "lora-vit-mica",
    "lora-convnext-mlp",
    "lora-convnext-doc-regex",
    "lora-convnext-all-linear",
    "lora-convnext-conv-kxk",
    "lora-convnext-conv1x1",
    "lora-convnext-head-mts",
]
"""The oracle's cases of plain LoRA, whose base weights no initialisation rewrites."""

COMBINED = [
    "weighted-cat",
    "weighted-linear",
    "weighted-linear-rslora",
    "weighted-magnitude-prune-svd",
    "weighted-svd",
    "weighted-svd-conv",
    "weighted-ties",
]
"""Adapters that PEFT made of two others; plain LoRA again."""

PREFIX = "base_model.model."


def base_model(case: Path, **changes: Any) -> keras.Model:
    """The model that a PEFT case starts from."""
    meta = load_meta(case)
    return tfimm_lora.create_model(meta["timm_name"], **base_arguments(case), **changes)


def with_adapter(case: Path) -> keras.Model:
    """The case's base model with the adapter that PEFT saved."""
    return lora.load_adapter(base_model(case), str(case / "adapter"))


def base_arguments(case: Path) -> dict[str, Any]:
    """Keyword arguments of ``create_model`` for a case's base model."""
    meta = load_meta(case)
    return {
        "model_path": str(case / "base.safetensors"),
        "nb_classes": meta["num_classes"],
        **meta["timm_kwargs"],
    }


def peft_names(model: keras.Model, config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's name -> variable, for everything that a LoRA model trains."""
    adapted = {timm_key(v.path).rpartition(".")[0] for v in model.variables if "_lora_" in v.path}
    names = {}
    for variable in model.trainable_variables:
        module, _, leaf = timm_key(variable.path).rpartition(".")
        if "lora" in leaf:
            tensor = {
                "kernel_lora_a": "lora_A.weight",
                "kernel_lora_b": "lora_B.weight",
                "lora_bias": "lora_B.bias",
            }[leaf]
            names[f"{PREFIX}{module}.{tensor}"] = variable
        elif module in adapted:
            names[f"{PREFIX}{module}.base_layer.{leaf}"] = variable
        else:
            names[f"{PREFIX}{module}.{leaf}"] = variable
    return names


def in_peft_layout(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight or gradient of ours in the layout of PEFT's tensor of that name."""
    if name.endswith("lora_B.weight") and value.ndim == 2:  # (r, out): a 1x1 convolution in PEFT
        return value.T.reshape(shape)
    key = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return torch_layout(key, value).reshape(shape)


def gradients(model: keras.Model, images: np.ndarray, probe: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient of ``sum(logits * probe)`` for every trainable variable, by path."""
    variables = model.trainable_variables
    if keras.backend.backend() == "jax":
        import jax

        def loss(values: Any) -> Any:
            logits, _ = model.stateless_call(
                values, [v.value for v in model.non_trainable_variables], images, training=False
            )
            return (logits * probe).sum()

        values = jax.grad(loss)([v.value for v in variables])
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            total = tf.reduce_sum(model(images, training=False) * probe)
        values = tape.gradient(total, [v.value for v in variables])
    assert all(value is not None for value in values)
    return {v.path: np.asarray(g) for v, g in zip(variables, values, strict=True)}
