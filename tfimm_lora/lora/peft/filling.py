"""Giving an adapter of a model the values of a file: all of them, or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import config_to_dict
from tfimm_lora.lora.adapter_state import adapter_state
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.initialization import keeps_first_factors
from tfimm_lora.lora.peft.adapter_file import AdapterFile
from tfimm_lora.lora.peft.identity import adapter_fields, base_hash, model_name
from tfimm_lora.lora.peft.tensors import (
    LayerTensors,
    ShapesDiffer,
    layer_from_peft,
    layer_to_peft,
    slice_path,
)
from tfimm_lora.lora.trainable import (
    classifier_of,
    fully_trained_layers,
    kept_variables,
    own_config,
)
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.loading import classes_of
from tfimm_lora.weights.names import NamedVariable, iterate_layers, timm_path
from tfimm_lora.weights.patterns import pattern_value


def adapted_layers(model: Any, name: str) -> dict[str, Any]:
    """Layers that an adapter adapts by timm path."""
    return {
        timm_path(p): la
        for p, la in iterate_layers(model)
        if isinstance(la, LoRALayer) and name in la.adapters
    }


def stored_keys(model: Any, name: str, fields: Any) -> dict[str, NamedVariable]:
    """Weights of the model itself that belong to an adapter, by their key in the file."""
    method = METHODS[fields.lora_method]
    modules = fully_trained_layers(model, name, fields)
    keys = {}
    for v in kept_variables(model, name, fields):
        adapted = isinstance(v.layer, LoRALayer) and name in v.layer.adapters
        key = v.name
        if not any(is_below(v.name, m) for m in modules):
            if adapted and v.name.endswith(".bias"):
                key = f"{v.module}.base_layer.bias"
            elif method.in_place and method.trains(v, fields):
                key = method.peft_key(v.name)
        keys[key] = v
    return keys


def check_classes(model: Any, adapter: AdapterFile) -> None:
    """Raises if an adapter's classifier is not as large as the model's.

    Raises:
        ValueError: Says both numbers.
    """
    shapes = {key: tuple(value.shape) for key, value in adapter.tensors.items()}
    found = classes_of(shapes, classifier_of(model))
    classes = getattr(getattr(model, "cfg", None), "nb_classes", None)
    if found and classes is not None and found != classes:
        raise ValueError(
            f"{adapter.source}: the adapter's classifier has {found} classes and the model "
            f"{classes}. Create the model with nb_classes={found}."
        )


def check_same(fields: Any, adapter: AdapterFile) -> None:
    """Raises if an adapter's method, options or bias mode are not those of the file.

    Raises:
        ValueError: Says both.
    """
    found = config_to_dict(fields)
    wanted = adapter.fields
    method = METHODS[found["lora_method"]]
    for key in ("lora_method", "lora_train_bias", "lora_options"):
        mine, theirs = found.get(key), wanted.get(key, found.get(key))
        if key == "lora_options":
            mine, theirs = _as_options(method, mine), _as_options(method, theirs)
        if mine != theirs:
            raise ValueError(
                f"{adapter.source}: the adapter has {key}={theirs!r} and the model {mine!r}. Load "
                "it onto the regular model, which is converted as the adapter says."
            )
    mine, theirs = found.get("lora_init"), wanted.get("lora_init")
    # Our files hold the first factors, PEFT's mean those of the initialisation that they name.
    kept = keeps_first_factors(mine), keeps_first_factors(theirs)
    if kept[0] != kept[1] or (kept[0] and not adapter.own and mine != theirs):
        raise ValueError(
            f"{adapter.source}: the adapter began with lora_init={theirs!r} and the model with "
            f"{mine!r}, and one of them says the first factors that the update is measured from. "
            "Load it onto the regular model, which is converted as the adapter says."
        )


def _as_options(method: Any, values: Any) -> Any:
    try:
        return method.Options(**(values or {}))
    except TypeError:
        return values


def _check_kernels(model: Any, adapter: AdapterFile) -> None:
    """Warns if kernels are stored in another format than those of the file, else raises.

    Raises:
        ValueError: The format is the same, so that the weights are others.
    """
    theirs, mine = (
        {k: fields.get(k) for k in ("lora_quantization", "lora_group_size")}
        for fields in (adapter.own["lora"], vars(own_config(model)))
    )
    if theirs == mine:
        raise ValueError(
            f"{adapter.source}: the adapter was trained on other weights of "
            f"{adapter.own['model']!r} than this model ({model_name(model)!r}) has. Load the "
            "weights it was trained on, or pass check_base=False if you are sure."
        )
    warnings.warn(
        f"{adapter.source}: the adapter was trained on kernels with {_said(theirs)}, and this "
        f"model has {_said(mine)}: outputs differ by what was rounded. Whether the weights are "
        "otherwise the same cannot be told.",
        stacklevel=2,
    )


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())


def fill_adapter(model: Any, name: str, adapter: AdapterFile, check_base: bool) -> None:
    """Gives an adapter of a model the values of a file.

    Everything is checked, then everything is assigned: an error leaves the model as it was.

    Args:
        model: A LoRA model with the adapter.
        name: Name of the adapter.
        adapter: The file.
        check_base: Raise if the base model's weights are not those of the file; warn if its
            kernels are in another format, so that this cannot be told.

    Raises:
        ValueError: The file does not fit.
    """
    state, source = adapter_state(model), adapter.source
    if adapter.own and check_base and adapter.own["base_sha256"] != base_hash(model, name):
        _check_kernels(model, adapter)
    fields = adapter_fields(state, name)
    method = METHODS[fields.lora_method]
    layers = adapted_layers(model, name)
    stored = stored_keys(model, name, fields)
    try:
        tensors = method.complete_peft(adapter.config, adapter.tensors, layers)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
    tensors = _with_joined_biases(tensors, stored, model)
    _check_scales(adapter, layers, name, source)
    wanted = {}
    for module, layer in layers.items():
        apart = _slices_apart(layer.adapters[name], module, tensors)
        wanted[module] = layer_to_peft(layer.adapters[name], module, packed=not apart)
    _check_names(tensors, wanted, stored, method, source)
    values: list[tuple[Any, np.ndarray]] = []
    try:
        for module, layer in layers.items():
            values += layer_from_peft(layer.adapters[name], module, tensors, wanted[module])
    except ShapesDiffer as error:
        raise ValueError(f"{source}: {error}.{_size_note(error, model)}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    kept: dict[str, np.ndarray] = {}
    for key, v in stored.items():
        value = v.from_timm(tensors[key])
        if tuple(value.shape) != tuple(v.variable.shape):
            raise ValueError(
                f"{source}: {key} has shape {tuple(value.shape)} in the adapter and "
                f"{tuple(v.variable.shape)} in the model (Keras' layout)."
            )
        if name in state.active:
            values.append((v.variable, value))
        else:
            kept[v.name] = value
    for variable, value in values:
        variable.assign(value)
    if name not in state.active:
        state.kept[name] = kept


def _slices_apart(adapter: Any, module: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the file has keys of their own for the slices of a layer."""
    names = [update.site.name for update in adapter.updates]
    paths = [f"{slice_path(module, n)}." for n in names if n]
    return any(key.startswith(path) for key in tensors for path in paths)


def _check_names(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, LayerTensors],
    stored: Mapping[str, Any],
    method: Any,
    source: str,
) -> None:
    expected = set(stored) | {key for found in wanted.values() for key in found.tensors}
    optional = set(method.peft_shared)
    missing = sorted(expected - set(tensors) - optional)
    surplus = sorted(set(tensors) - expected - optional)
    if missing or surplus:
        raise ValueError(
            f"{source}: the adapter does not fit the model. Missing in the adapter: "
            f"{', '.join(missing[:5]) or 'nothing'}. Not in the model: "
            f"{', '.join(surplus[:5]) or 'nothing'}."
        )


def _check_scales(adapter: AdapterFile, layers: Mapping[str, Any], name: str, source: str) -> None:
    """Raises if a model's update has another rank or scale than the adapter says."""
    fields = adapter.fields
    if "lora_rank" not in fields:
        return
    ranks, alphas = (fields.get(f"lora_{k}_pattern") or {} for k in ("rank", "alpha"))
    for module, layer in layers.items():
        for update in layer.adapters[name].updates:
            site = update.site
            path = slice_path(module, site.name) if site.name else module
            rank = pattern_value(ranks, path, fields["lora_rank"])
            alpha = pattern_value(alphas, path, fields.get("lora_alpha"))
            alpha = rank if alpha is None else alpha
            if site.rank != rank or abs(site.alpha - alpha) > 1e-6 * abs(alpha):
                raise ValueError(
                    f"{source}: {path} has rank {rank} and alpha {alpha:g} in the adapter, rank "
                    f"{site.rank} and alpha {site.alpha:g} in the model. Load the adapter onto the "
                    "regular model, which is converted as the adapter says."
                )


def _with_joined_biases(
    tensors: Mapping[str, np.ndarray], stored: Mapping[str, NamedVariable], model: Any
) -> dict[str, np.ndarray]:
    """Joins the biases of queries, keys and values that the file has one by one."""
    found = dict(tensors)
    slices: Mapping[str, Any] = getattr(model, "lora_slices", {})
    for key, v in stored.items():
        names = next((n for s, n in slices.items() if v.module.endswith(s)), ())
        if key in found or not key.endswith(".bias"):
            continue
        keys = [
            [f"{slice_path(v.module, n)}{end}" for end in (".base_layer.bias", ".bias")]
            for n in names
        ]
        parts = [next((found.pop(k) for k in ks if k in found), None) for ks in keys]
        if all(part is None for part in parts):
            continue
        # What the file does not have was not trained.
        base = np.split(adapter_state(model).value_of("", v), len(names))
        found[key] = np.concatenate(
            [b if p is None else p for p, b in zip(parts, base, strict=True)]
        )
    return found


def _size_note(error: ShapesDiffer, model: Any) -> str:
    """Which width the adapter's model has, if the shapes tell."""
    cfg = own_config(model) if not hasattr(model, "cfg") else model.cfg
    width = getattr(cfg, "embed_dim", None)
    pairs = [(f, e) for f, e in zip(error.found, error.expected, strict=False) if f != e]
    if len(error.found) != len(error.expected) or len(pairs) != 1:
        return ""
    found, expected = pairs[0]
    if isinstance(width, int) and expected % width == 0 and (found * width) % expected == 0:
        theirs = found * width // expected
        return f" The adapter is for a model of width {theirs}, this one has {width}."
    return f" The adapter's model has {found} features where this one has {expected}."
