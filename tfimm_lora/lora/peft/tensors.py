"""From the variables of an adapter to the tensors of PEFT's files, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tfimm_lora.lora.layer_adapter import LayerAdapter
from tfimm_lora.lora.methods import Method

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."


@dataclasses.dataclass
class LayerTensors:
    """What one adapted layer has in a file.

    Attributes:
        tensors: Tensors by timm path and end of key; shared ones by their name alone.
        sites: Rank and alpha by the module that the tensors are below.
        known: Whether PEFT has such tensors.
    """

    tensors: dict[str, np.ndarray]
    sites: dict[str, tuple[int, float]]
    known: bool = True


def slice_path(module: str, name: str) -> str:
    """Path of a slice of a layer's outputs.

    Example:
        >>> slice_path("blocks.0.attn.qkv", "q")
        'blocks.0.attn.q'
    """
    parent = module.rpartition(".")[0]
    return f"{parent}.{name}" if parent else name


def layer_to_peft(adapter: LayerAdapter, module: str, packed: bool = True) -> LayerTensors:
    """Returns the tensors of a layer's adapter in PEFT's layouts.

    Args:
        adapter: The adapter in the layer.
        module: timm path of the layer.
        packed: Express slices as one update of the whole layer where the method can. Otherwise,
            and where it cannot, every slice has keys of its own.
    """
    method, updates = adapter.method, adapter.updates
    whole = not updates[0].site.name
    if not whole and packed and method.peft_type is not None:
        found = method.pack(updates)
        if found is not None:
            tensors, rank, alpha = found
            return LayerTensors(_keyed(method, module, tensors), {module: (rank, alpha)})
    result = LayerTensors({}, {}, known=whole and method.peft_type is not None)
    for update in updates:
        path = module if whole else slice_path(module, update.site.name)
        result.tensors |= _keyed(method, path, _tensors(update))
        result.sites[path] = (update.site.rank, update.site.alpha)
    return result


def _tensors(update: Method) -> dict[str, np.ndarray]:
    return update.to_peft() if update.peft_type is not None else update.numpy_values()


def _keyed(
    method: type[Method], module: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {(e if e in method.peft_shared else f"{module}.{e}"): v for e, v in tensors.items()}


def merge_shared(
    found: Iterable[Mapping[str, np.ndarray]], shared: Iterable[str]
) -> dict[str, Any]:
    """Puts the tensors of all layers together; of shared ones the largest is taken.

    Raises:
        ValueError: A shared tensor is not the leading part of the largest.
    """
    names = set(shared)
    merged: dict[str, np.ndarray] = {}
    for tensors in found:
        for key, value in tensors.items():
            if key in names and key in merged:
                small, large = sorted((value, merged[key]), key=lambda v: v.size)
                leading = large[tuple(slice(0, n) for n in small.shape)]
                if leading.shape != small.shape or not np.array_equal(leading, small):
                    raise ValueError(
                        f"The layers have different {key}, which PEFT stores once for all."
                    )
                value = large
            merged[key] = value
    return merged


def layer_from_peft(
    adapter: LayerAdapter, module: str, tensors: Mapping[str, np.ndarray], wanted: LayerTensors
) -> list[tuple[Any, np.ndarray]]:
    """Turns PEFT's tensors into values of the variables of a layer's adapter.

    Args:
        adapter: The adapter in the layer.
        module: timm path of the layer.
        tensors: All tensors of the file, see :class:`LayerTensors`.
        wanted: What :func:`layer_to_peft` returns for the layer in the form that the file has.

    Raises:
        ValueError: Shapes differ, or packed slices touch other outputs.
    """
    method, updates = adapter.method, adapter.updates
    values: list[Any] = []
    try:
        if updates[0].site.name and list(wanted.sites) == [module]:
            values = method.unpack(updates, _below(method, module, tensors))
        else:
            for update, path in zip(updates, wanted.sites, strict=True):
                own = _below(method, path, tensors)
                values.append(update.from_peft(own) if method.peft_type is not None else own)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        _check_shapes(tensors, wanted)
        raise ValueError(f"{module}: {error}") from error
    found = []
    for update, by_name in zip(updates, values, strict=True):
        for key, value in by_name.items():
            variable = update.variable(key)
            if variable is None or tuple(value.shape) != tuple(variable.shape):
                _check_shapes(tensors, wanted)
                shape = None if variable is None else tuple(variable.shape)
                raise ValueError(
                    f"{module}: {key} has shape {tuple(value.shape)} in the adapter and {shape} in "
                    "the model."
                )
            found.append((variable, value))
    # A method may take a matrix for a 1x1 convolution; PEFT does not.
    _check_shapes(tensors, wanted, of_equal_size=True)
    return found


def _below(
    method: type[Method], module: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    start = f"{module}."
    own = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    return {k: v for k, v in tensors.items() if k in method.peft_shared} | own


class ShapesDiffer(ValueError):
    """A tensor of the file has another shape than the model's.

    Attributes:
        key: Its name.
        found: Its shape in the file.
        expected: Its shape in the model.
    """

    def __init__(self, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        super().__init__(f"{key} has shape {found} in the adapter and {expected} in the model")
        self.key, self.found, self.expected = key, found, expected


def _check_shapes(
    tensors: Mapping[str, np.ndarray], wanted: LayerTensors, of_equal_size: bool = False
) -> None:
    for key, value in wanted.tensors.items():
        if key not in tensors or (of_equal_size and tensors[key].size != value.size):
            continue
        if tensors[key].shape != value.shape:
            raise ShapesDiffer(key, tensors[key].shape, value.shape)
