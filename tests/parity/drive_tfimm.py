"""Runs tfimm 0.2.14 (Keras 2).

``run`` takes weights under timm's names, ``save`` writes files of random ones.
Weights come as ``.npz``: timm's keys and torch's layouts for the base model,
``PATH.kernel_lora_a`` and ``PATH.kernel_lora_b`` in Keras' layouts for the LoRA weights.
"""

from __future__ import annotations

from pathlib import Path
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


def _randomise(network: Any, seed: int = 0) -> None:
    """Gives all weights, low-rank factors too, values far from the initial ones."""
    rng = np.random.default_rng(seed)
    for variable in network.weights:
        noise = rng.standard_normal(variable.shape)
        leaf = variable.name.split(":")[0].rpartition("/")[2]
        if leaf == "gamma":
            noise = 1.0 + 0.3 * noise
        elif "kernel" in leaf:
            noise = noise / np.sqrt(np.prod(variable.shape[:-1]))
        else:
            noise = 0.3 * noise
        variable.assign(noise.astype("float32"))


def save(out: str, model: str, config: dict[str, Any], fit: bool, after: str) -> None:
    """Saves a model in the ways that tfimm's users have, with what it answers.

    Args:
        out: New folder: ``weights.h5``, ``weights.ckpt``, ``new.weights.h5``, ``new.keras``; of a
            trained model, the SavedModel ``saved`` and the checkpoints of tfimm's trainer in
            ``trainer``, too; and ``images.npy``, ``logits.npy``.
        model: Key of ``MODELS``.
        config: Fields of tfimm's configuration.
        fit: Train a step first, so that there are an optimizer and metrics to be saved.
        after: ``merge`` or ``regular`` to do so with a LoRA model before it is saved, or ``""``.
    """
    folder = Path(out)
    folder.mkdir(parents=True)
    model_class, config_class = MODELS[model]
    network = model_class(config_class(name="net", **config))
    network(network.dummy_inputs)
    _randomise(network)
    shape = (2, *network.cfg.input_size, network.cfg.in_channels)
    images = np.random.default_rng(1).standard_normal(shape).astype("float32")
    if fit:
        network.compile("adam", "mse", metrics=["mae"])
        network.fit(images, np.zeros((2, network.cfg.nb_classes), "float32"), verbose=0)
    if after == "merge":
        lora.merge_lora_weights(network)
    elif after == "regular":
        network = lora.convert_to_regular_model(network)
    np.save(folder / "images.npy", images)
    np.save(folder / "logits.npy", network(tf.constant(images)).numpy())
    network.save_weights(str(folder / "weights.h5"))
    network.save_weights(str(folder / "weights.ckpt"))
    network.save_weights(str(folder / "new.weights.h5"))
    network.save(str(folder / "new.keras"))
    if fit:
        network.save(str(folder / "saved"))
        # The names and the manager of tfimm.train.
        checkpoint = tf.train.Checkpoint(
            epoch=tf.Variable(3),
            avg_acc=tf.keras.metrics.Mean(),
            model=network,
            optimizer=network.optimizer or tf.Module(),
        )
        tf.train.CheckpointManager(checkpoint, str(folder / "trainer"), max_to_keep=1).save()


if __name__ == "__main__":
    serve({"run": run, "save": save})
