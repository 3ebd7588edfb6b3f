"""Runs tfimm 0.2.14 (Keras 2) with weights that are handed to it under timm's names.

Weights come as ``.npz``: timm's keys and torch's layouts for the base model,
``PATH.kernel_lora_a`` and ``PATH.kernel_lora_b`` in Keras' layouts for the LoRA weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from serve import serve
from tfimm.architectures import lora
from tfimm.architectures.convnext import ConvNeXt, ConvNeXtConfig
from tfimm.architectures.vit import ViT, ViTConfig

MODELS = {
    "ConvNeXt": (ConvNeXt, ConvNeXtConfig),
    "LoRAConvNeXt": (lora.LoRAConvNeXt, lora.LoRAConvNeXtConfig),
    "ViT": (ViT, ViTConfig),
}

TIMM_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
}


def _value(variable: Any, weights: dict[str, np.ndarray]) -> np.ndarray:
    """The weight of a tfimm variable, in its layout."""
    *path, leaf = variable.name.split(":")[0].split("/")[1:]
    prefix = ".".join(path)
    if leaf in ("kernel_lora_a", "kernel_lora_b"):
        return weights[f"{prefix}.{leaf}"]
    if leaf == "gamma" and f"{prefix}.gamma" in weights:  # layer scale
        return weights[f"{prefix}.gamma"]
    leaf = TIMM_LEAVES.get(leaf, leaf)
    value = weights[f"{prefix}.{leaf}" if prefix else leaf]
    if variable.name.endswith("depthwise_kernel:0"):
        return value.transpose(2, 3, 0, 1)  # (channels, 1, height, width)
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if leaf == "weight" and value.ndim == 2 else value


def run(out: str, model: str, config: dict[str, Any], weights: str, inputs: str) -> dict[str, Any]:
    """Writes the logits, and for a LoRA model those after merging, and the merged kernels."""
    model_class, config_class = MODELS[model]
    network = model_class(config_class(name="net", **config))
    network(network.dummy_inputs)
    with np.load(weights) as archive:
        values = dict(archive)
    for variable in network.weights:
        variable.assign(_value(variable, values))
    images = tf.constant(np.load(inputs))
    results = {"logits": network(images).numpy()}
    if model.startswith("LoRA"):
        results["trainable"] = np.array(sum(int(tf.size(w)) for w in network.trainable_weights))
        lora.merge_lora_weights(network)
        results["merged_logits"] = network(images).numpy()
        regular = lora.convert_to_regular_model(network)
        results["regular_logits"] = regular(images).numpy()
    np.savez(out, **results)
    return {"weights": len(network.weights), "given": len(values)}


if __name__ == "__main__":
    serve({"run": run})
