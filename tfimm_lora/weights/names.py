"""One rule between Keras' variables and timm's names and layouts.

``vit/blocks_3/mlp/fc1/kernel`` is ``blocks.3.mlp.fc1.weight``: the model's name goes, ``/`` and
the underscore in front of a trailing number become ``.``, and a few leaves are renamed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfimm_lora.layers.norm import NORMALIZATION_LAYERS

LORA_WEIGHT_NAMES = [
    "kernel_lora_a",
    "kernel_lora_b",
    "kernel_lora_e",
    "lora_bias",
    "lora_magnitude_vector",
    "hada_w",
    "hada_t",
    "lokr_w",
    "lokr_t",
    "vera_lambda",
    "vera_projection",
    "ia3_l",
    "oft_r",
    "boft_r",
    "boft_s",
]
"""Patterns of the names of adapters' weights, to leave them out of weight transfers."""

_LEAVES = {"kernel": "weight"}
_NORM_LEAVES = {
    "gamma": "weight",
    "scale": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclasses.dataclass(frozen=True)
class NamedVariable:
    """A variable with its place in the model.

    Attributes:
        name: timm name, ``blocks.3.mlp.fc1.weight``.
        path: Path without the model's name, ``blocks_3/mlp/fc1/kernel``.
        layer: The layer that owns the variable.
        variable: The variable.
    """

    name: str
    path: str
    layer: keras.layers.Layer
    variable: Any

    @property
    def module(self) -> str:
        """Name of the owning layer, ``blocks.3.mlp.fc1``."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Keras name of the variable within its layer, ``kernel``."""
        return self.path.rpartition("/")[2]

    def to_timm(self) -> np.ndarray:
        """The value in torch's layout."""
        return np.ascontiguousarray(
            to_timm_layout(self.layer, self.leaf, variable_value(self.variable))
        )

    def from_timm(self, value: np.ndarray) -> np.ndarray:
        """A value in torch's layout, turned into Keras' layout."""
        return from_timm_layout(self.layer, self.leaf, value)


def variable_value(variable: Any) -> np.ndarray:
    """Returns a copy of a variable's value."""
    if is_stored(variable):
        return variable.numpy()
    # By way of a tensor: NumPy warns when it is handed a TensorFlow variable.
    return np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)))


def timm_path(path: str) -> str:
    """Turns a layer path into a timm path: ``blocks_3/mlp`` to ``blocks.3.mlp``."""
    return re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")


def iterate_layers(model: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields every layer below ``model`` once with its path, parents first.

    Args:
        model: Any Keras model or layer, built or not.

    Yields:
        Tuples of a path such as ``blocks_3/mlp/fc1`` and the layer.

    Example:
        >>> paths = [path for path, layer in iterate_layers(model)]
    """
    seen = {id(model)}

    def walk(parent: keras.layers.Layer, prefix: str) -> Iterator[tuple[str, Any]]:
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen or isinstance(layer, keras.metrics.Metric):
                continue
            seen.add(id(layer))
            path = f"{prefix}{layer.name}"
            yield path, layer
            yield from walk(layer, path + "/")

    yield from walk(model, "")


def own_variables(layer: keras.layers.Layer) -> list[Any]:
    """Returns the variables that belong to the layer itself, not to its sublayers.

    A kernel that is packed is there once, as what ``layer.kernel`` is, not in its parts.
    """
    variables = [*layer._trainable_variables, *layer._non_trainable_variables]
    kernel = next((k for n in ("_kernel", "kernel") if is_stored(k := vars(layer).get(n))), None)
    if kernel is None:
        return variables
    parts = {id(part) for part in kernel.variables.values()}
    return [kernel, *(v for v in variables if id(v) not in parts)]


def is_stored(variable: Any) -> bool:
    """Whether what stands for a kernel is a packed one instead of a variable.

    See :class:`~tfimm_lora.quantization.StoredKernel`.
    """
    return hasattr(variable, "readers")


def named_variables(model: keras.layers.Layer) -> list[NamedVariable]:
    """Lists all weights of a model with their places, random states left out.

    Args:
        model: A built model.

    Raises:
        ValueError: Two weights have the same path, because sibling layers share a name.

    Example:
        >>> names = [v.name for v in named_variables(model)]
    """
    found: dict[str, NamedVariable] = {}
    for path, layer in [("", model), *iterate_layers(model)]:
        for number, variable in enumerate(own_variables(layer)):
            # Keras numbers variables that nobody named, over all models of the process.
            leaf = re.sub(r"^variable(_\d+)?$", f"variable_{number}", variable.name)
            table = _NORM_LEAVES if isinstance(layer, NORMALIZATION_LAYERS) else _LEAVES
            prefix = f"{timm_path(path)}." if path else ""
            named = NamedVariable(
                prefix + table.get(leaf, leaf), f"{path}/{leaf}".lstrip("/"), layer, variable
            )
            if named.path in found:
                raise ValueError(
                    f"Two weights have the path {named.path!r}. Give the layers different names."
                )
            found[named.path] = named
    return list(found.values())


def is_lora_weight(leaf: str) -> bool:
    """Whether a variable name is that of an adapter's weight."""
    return any(leaf.startswith(name) for name in LORA_WEIGHT_NAMES)


def timm_variables(model: keras.layers.Layer) -> dict[str, NamedVariable]:
    """Maps timm names to the weights of a model, low-rank factors left out.

    Args:
        model: A built model.

    Returns:
        Dictionary from ``blocks.3.mlp.fc1.weight`` to :class:`NamedVariable`.

    Example:
        >>> kernel = timm_variables(model)["head.weight"].variable
    """
    return {v.name: v for v in named_variables(model) if not is_lora_weight(v.leaf)}


def to_timm_layout(layer: keras.layers.Layer, leaf: str, value: np.ndarray) -> np.ndarray:
    """Turns a kernel from Keras' into torch's axis order; other weights stay as they are."""
    if leaf != "kernel":
        return value
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        height, width, channels, multiplier = value.shape
        return value.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    if isinstance(layer, keras.layers.Conv2D):
        return value.transpose(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def from_timm_layout(layer: keras.layers.Layer, leaf: str, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_timm_layout`."""
    if leaf != "kernel":
        return value
    if isinstance(layer, keras.layers.DepthwiseConv2D) and value.ndim == 4:
        out, _, height, width = value.shape
        multiplier = layer.depth_multiplier
        value = value.reshape(out // multiplier, multiplier, height, width)
        return value.transpose(2, 3, 0, 1)
    if isinstance(layer, keras.layers.Conv2D) and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value
