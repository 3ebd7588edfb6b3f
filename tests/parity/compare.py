"""Reading cases, timm's names for our weights, and how far two outputs are apart.

The naming rule is written down here a second time, from the design and not from the package, so
that a mistake in the package's own rule cannot hide.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import keras
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import load_file

TIMM_TOLERANCE = 5e-5
"""Largest difference from timm, in standard deviations of what timm answers."""


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute difference over the standard deviation of ``theirs``."""
    ours = np.asarray(keras.ops.convert_to_numpy(ours), "float64")
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / theirs.std())


def scaled_error(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of ``theirs``."""
    ours = np.asarray(keras.ops.convert_to_numpy(ours), "float64")
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def load(case: Path, name: str) -> np.ndarray:
    """An array of a case."""
    return np.load(case / f"{name}.npy")


def load_meta(case: Path) -> dict[str, Any]:
    """What the oracle noted down about a case."""
    return json.loads((case / "meta.json").read_text())


def load_tensors(path: Path | str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, in float32."""
    return {key: value.astype("float32") for key, value in load_file(str(path)).items()}


def timm_key(path: str) -> str:
    """timm's key for a path: ``vit/blocks_3/mlp/fc1/kernel`` is ``blocks.3.mlp.fc1.weight``."""
    *layers, leaf = path.split("/")[1:]
    layers = [re.sub(r"_(\d+)$", r".\1", layer) for layer in layers]
    parent = layers[-1] if layers else ""
    if leaf == "kernel":
        leaf = "weight"
    # A layer scale's `gamma` keeps its name: in ViT its layer is `ls1` or `ls2`, in ConvNeXt it
    # belongs to the block itself.
    elif leaf in ("gamma", "beta") and not re.fullmatch(r"ls\d?|blocks\.\d+", parent):
        leaf = {"gamma": "weight", "beta": "bias"}[leaf]
    return ".".join([*layers, leaf])


def torch_layout(key: str, value: np.ndarray) -> np.ndarray:
    """A Keras weight in torch's layout."""
    if key.endswith("conv_dw.weight"):  # (h, w, channels, 1) -> (channels, 1, h, w)
        return value.transpose(2, 3, 0, 1)
    if value.ndim == 4:  # (h, w, in, out) -> (out, in, h, w)
        return value.transpose(3, 2, 0, 1)
    return value.T if key.endswith("weight") and value.ndim == 2 else value


def timm_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """A model's weights under timm's names and in torch's layouts, without LoRA weights."""
    weights = {}
    for variable in model.variables:
        if "_lora_" in variable.path or "seed_generator" in variable.path:
            continue
        key = timm_key(variable.path)
        value = torch_layout(key, keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)))
        weights[key] = np.ascontiguousarray(value)
    return weights


def set_timm_weights(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    """Assigns weights that are given under timm's names and in torch's layouts."""
    left = dict(weights)
    for variable in model.variables:
        key = timm_key(variable.path)
        if "_lora_" not in variable.path and key in left:
            variable.assign(keras_layout(key, left.pop(key)))
    assert not left, f"no such weights: {sorted(left)}"


def keras_layout(key: str, value: np.ndarray) -> np.ndarray:
    """A weight in torch's layout in Keras' layout."""
    if key.endswith("conv_dw.weight"):
        return value.transpose(2, 3, 0, 1)
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if key.endswith("weight") and value.ndim == 2 else value


def random_weights(model: keras.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Values far from the initial ones for all weights of a model, under timm's names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for key, value in sorted(timm_weights(model).items()):
        noise = rng.standard_normal(value.shape)
        if key.endswith("gamma") or (key.endswith("weight") and value.ndim == 1):
            weights[key] = 1.0 + 0.3 * noise
        elif value.ndim >= 2 and key.endswith("weight"):
            weights[key] = noise / np.sqrt(np.prod(value.shape[1:]))
        else:
            weights[key] = 0.3 * noise
    return {key: value.astype("float32") for key, value in weights.items()}


def move_trainable(model: keras.Model, seed: int = 0) -> None:
    """Adds noise to every trainable weight, so that no factor, bias or head is where it began."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.standard_normal(variable.shape).astype("float32")
        variable.assign_add(0.3 * noise / np.sqrt(max(variable.shape[0], 1)))
