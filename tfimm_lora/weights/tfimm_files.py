"""Weights that tfimm 0.2 has saved, under timm's names.

tfimm runs on Keras 2. ``vit/blocks/3/mlp/fc1/kernel`` is ``blocks.3.mlp.fc1.weight``: the model's
name goes, ``/`` becomes ``.``, and the leaves are renamed.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.weights.keras2_files import (
    StoredVariable,
    checkpoint_variables,
    layout_of,
    named_hdf5_variables,
)

_CONVERT = (
    "In the old environment (with TF_USE_LEGACY_KERAS=1 where TensorFlow is 2.16 or later) type "
    "model.save_weights('model.h5') and load that file"
)

# Axes in the order of torch.
_AXES = {"depthwise_kernel": (2, 3, 0, 1), "kernel": (3, 2, 0, 1)}


def is_tfimm_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to weights that Keras 2 has saved by name, as tfimm does.

    Args:
        path: A ``.h5`` file, the prefix or folder of a TensorFlow checkpoint, or anything else.

    Raises:
        ValueError: The file is one of Keras that has no names, is of another Keras, or is cut off;
            the message says how to convert it.

    Example:
        >>> is_tfimm_file("model.safetensors")
        False
    """
    path = Path(path)
    layout = layout_of(path)
    if layout == "positions":
        raise ValueError(
            f"{path} was saved by Keras 2.12 or later in its newer layout, which has no names of "
            f"weights. {_CONVERT}; a .keras file is opened there with tf.keras.models.load_model, "
            "a .weights.h5 file with model.load_weights."
        )
    if layout == "keras3":
        raise ValueError(
            f"{path} is an HDF5 file of a whole model that Keras 3 has saved, not one of tfimm. "
            "Load it with keras.saving.load_model, or save the model as .keras or its weights as "
            ".weights.h5."
        )
    if layout == "broken" and not path.name.endswith(".weights.h5"):
        with named_hdf5_variables(path):  # raises, and says what is broken
            pass
    return layout in ("names", "checkpoint")


class TfimmFile:
    """An open file of tfimm's, read like a safetensors file in timm's names and layouts.

    Attributes:
        path: Where it is.
        shapes: Shape of every tensor by timm name; low-rank factors are called
            ``blocks.3.mlp.fc1.kernel_lora_a`` and have Keras' layout.
        metadata: Empty; the files have none.
        origin: What it is, for messages.
    """

    origin = "weights that tfimm has saved"

    def __init__(self, path: Path, variables: dict[str, StoredVariable]) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._variables: dict[str, tuple[StoredVariable, tuple[int, ...] | None]] = {}
        names = _without_model_name(variables)
        for name, variable in names.items():
            axes = _torch_axes(name, len(variable.shape))
            self._variables[_timm_name(name, names)] = (variable, axes)
        self.shapes = {
            name: variable.shape if axes is None else tuple(variable.shape[a] for a in axes)
            for name, (variable, axes) in self._variables.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32 array.

        Raises:
            ValueError: The tensor's bytes cannot be read.
        """
        variable, axes = self._variables[name]
        try:
            value = np.asarray(variable.read(), np.float32)
        except OSError as error:
            raise ValueError(f"{self.path}: weight {name!r} cannot be read: {error}") from error
        return value if axes is None else value.transpose(axes)

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """Rounds a float32 value to the precision that a tensor has in the file."""
        return value.astype(self._variables[name][0].dtype).astype(value.dtype)

    @property
    def lora_ranks(self) -> set[int]:
        """Ranks of the low-rank factors, empty for a regular model."""
        return {s[-1] for n, s in self.shapes.items() if n.endswith(".kernel_lora_a")}


@contextlib.contextmanager
def read_tfimm(path: str | os.PathLike[str]) -> Iterator[TfimmFile]:
    """Opens weights that tfimm has saved; tensors are read one by one when asked for.

    Args:
        path: A ``.h5`` file by ``model.save_weights``, the prefix of a TensorFlow checkpoint, or
            the folder by ``model.save``.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut off or of another kind.

    Example:
        >>> with read_tfimm("model.h5") as file:
        ...     kernel = file.read("head.weight")
    """
    path = Path(path)
    layout = layout_of(path)
    if not layout and not path.exists():
        raise FileNotFoundError(f"There is no weights file {path}.")
    if not is_tfimm_file(path):
        raise ValueError(f"{path} holds no weights that tfimm has saved. {_CONVERT}.")
    opened = checkpoint_variables if layout == "checkpoint" else named_hdf5_variables
    with opened(path) as variables:
        if not variables:
            raise ValueError(f"{path} holds no weights. Save the model after its first call.")
        yield TfimmFile(path, variables)


def check_lora_config(file: TfimmFile, cfg: Any) -> None:
    """Raises unless a config says about the low-rank factors of a file what the file does not.

    Args:
        file: The open file; nothing is to be said about one without low-rank factors.
        cfg: Config of the model that the weights are for.

    Raises:
        ValueError: The config is that of a regular model, has another rank, or no alpha.
    """
    if not file.lora_ranks:
        return
    rank = max(file.lora_ranks)
    if not hasattr(cfg, "lora_rank"):
        raise ValueError(
            f"{file.path} holds a LoRA model of rank {rank}. Load it with lora.create_model(..., "
            f"model_path=..., lora_rank={rank}, lora_alpha=1.0), with the lora_alpha of the "
            "training (tfimm's default is 1.0), and type lora.convert_to_regular_model(model) for "
            "a model without LoRA."
        )
    if len(file.lora_ranks) == 1 and cfg.lora_rank != rank:
        raise ValueError(
            f"{file.path} holds a LoRA model of rank {rank}, and the model's is {cfg.lora_rank}. "
            f"Pass lora_rank={rank}."
        )
    if cfg.lora_alpha is None:
        raise ValueError(
            f"{file.path} holds a LoRA model and does not say its alpha, which scales the update. "
            "Pass the lora_alpha of the training: lora_alpha=1.0 if none was given, for that is "
            "tfimm's default."
        )


def _without_model_name(variables: dict[str, StoredVariable]) -> dict[str, StoredVariable]:
    """Takes off what stands in front of all names: the model's, and that of a model around it."""
    paths = [name.split("/") for name in variables if "/" in name]
    levels = (set(level) for level in zip(*(path[:-1] for path in paths), strict=False))
    prefix = [level.pop() for level in takewhile(lambda level: len(level) == 1, levels)]
    if not prefix and paths:  # something else was saved along, which the loader will name
        prefix = [Counter(path[0] for path in paths).most_common(1)[0][0]]
    start = "/".join(prefix) + "/"
    return {name.removeprefix(start): variable for name, variable in variables.items()}


def _timm_name(name: str, names: Iterable[str]) -> str:
    """Returns timm's name of one weight; ``names`` are all names of the file."""
    module, _, leaf = name.rpartition("/")
    if leaf in ("kernel", "depthwise_kernel"):
        leaf = "weight"
    elif leaf == "beta":
        leaf = "bias"
    elif leaf == "gamma" and f"{module}/beta" in names:  # a layer scale has no beta
        leaf = "weight"
    return f"{module}/{leaf}".lstrip("/").replace("/", ".")


def _torch_axes(name: str, dimensions: int) -> tuple[int, ...] | None:
    """Order of the axes that turns a weight into torch's layout, ``None`` to leave it."""
    leaf = name.rpartition("/")[2]
    return {2: (1, 0), 4: _AXES[leaf]}.get(dimensions) if leaf in _AXES else None
