"""HDF5 files in the layout of Keras 2, with the names that tfimm gave to weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from tests.helpers import values


def keras2_weights(model: keras.Model, prefix: str = "net") -> dict[str, np.ndarray]:
    """A model's weights under the names that tfimm's variables have."""
    found = {}
    for path, value in values(model).items():
        name = re.sub(r"_(\d+)(?=/)", r"/\1", path).replace(
            "conv_dw/kernel", "conv_dw/depthwise_kernel"
        )
        found[f"{prefix}/{name}:0"] = value
    return found


def write_h5(
    path: Path,
    weights: dict[str, np.ndarray],
    version: str = "2.11.0",
    root: str = "/",
    chunks: int = 0,
) -> Path:
    """An HDF5 file with names, as Keras 2 writes it; lists of names are cut up into ``chunks``."""
    layers: dict[str, list[str]] = {}
    for name in weights:
        layer = name.split("/")[1] if name.count("/") > 1 else "top_level_model_weights"
        layers.setdefault(layer, []).append(name)

    def set_names(group: Any, name: str, names: list[str]) -> None:
        encoded = [n.encode() for n in names]
        if not chunks:
            group.attrs[name] = encoded
        for i, part in enumerate(np.array_split(encoded, chunks) if chunks else ()):
            group.attrs[f"{name}{i}"] = list(part)

    with h5py.File(path, "w") as file:
        group = file.require_group(root)
        file.attrs["keras_version"] = version
        set_names(group, "layer_names", [n for n in layers if n != "top_level_model_weights"])
        for layer, names in layers.items():
            set_names(group.create_group(layer), "weight_names", names)
            for name in names:
                group[layer][name] = weights[name]
    return path
