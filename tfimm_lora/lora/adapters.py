"""Saving what LoRA training changed, in PEFT's files, and loading it again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfimm_lora.architectures.config import config_to_dict, make_config
from tfimm_lora.lora.adapter_state import AdapterState, adapter_state
from tfimm_lora.lora.config import LoRAConfig, check_adapter_name, split_lora_values
from tfimm_lora.lora.keeps_adapters import KeepsAdapters
from tfimm_lora.lora.layer_adapter import KERNEL_ARGUMENTS
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.model_card import adapter_card, write_card
from tfimm_lora.lora.peft.adapter_file import AdapterFile
from tfimm_lora.lora.peft.config import KNOWN
from tfimm_lora.lora.peft.config import make_config as make_peft_config
from tfimm_lora.lora.peft.filling import (
    adapted_layers,
    check_classes,
    check_same,
    fill_adapter,
    stored_keys,
)
from tfimm_lora.lora.peft.identity import adapter_fields, base_hash, model_name
from tfimm_lora.lora.peft.reading import (
    CONFIG_FILE,
    METADATA,
    WEIGHTS_FILE,
    read_adapter,
)
from tfimm_lora.lora.peft.targets import adapts
from tfimm_lora.lora.peft.tensors import (
    PREFIX,
    SHARED_PREFIX,
    LayerTensors,
    layer_to_peft,
    merge_shared,
)
from tfimm_lora.lora.trainable import classifier_of, fully_trained_layers, own_config
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.version import __version__
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import to_timm_layout
from tfimm_lora.weights.safetensors_file import write_aside, write_safetensors


def save_adapter(model: keras.Model, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Saves low-rank factors, trained biases and fully trained layers in PEFT's format.

    PEFT loads the folder onto the same timm model with ``PeftModel.from_pretrained``. Each file is
    written aside and then renamed; whenever saving is interrupted, what can be loaded is the old
    adapter or the new one. A card, ``README.md``, comes beside them, unless there is one that was
    written or edited by hand.

    Args:
        model: A LoRA model, merged or not.
        folder: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: Name of the adapter; any other than ``default`` gets a folder of this name inside
            ``folder``, as in PEFT. Defaults to ``default``.

    Returns:
        The folder with the two files.

    Raises:
        ValueError: The model has no LoRA layers, or the name is no adapter's.

    Example:
        >>> save_adapter(model, "my_adapter")
    """
    # An adapter fits the backbone of an extractor, with or without the extractor.
    model = model.backbone if isinstance(model, FeatureExtractor) else model
    state = adapter_state(model)
    check_adapter_name(name)
    folder_name, name = name, _chosen(state, name)
    fields = adapter_fields(state, name)
    method = METHODS[fields.lora_method]
    layers = adapted_layers(model, name)
    if not layers and not method.in_place:
        raise ValueError(f"{model.name!r} has no LoRA layers, so there is no adapter to save.")
    found = {m: layer_to_peft(layer.adapters[name], m) for m, layer in layers.items()}
    tensors = merge_shared([f.tensors for f in found.values()], method.peft_shared)
    stored = stored_keys(model, name, fields)
    tensors |= {
        key: np.ascontiguousarray(to_timm_layout(v.layer, v.leaf, state.value_of(name, v)))
        for key, v in stored.items()
    }
    modules = fully_trained_layers(model, name, fields)
    if fields.lora_train_bias == "all":
        # PEFT then expects the biases of both its copies of a layer that is trained in full.
        for module in modules:
            for key in [k for k in stored if is_below(k, module) and k.endswith(".bias")]:
                for copy in ("original_module", "modules_to_save"):
                    tensors[f"{module}.{copy}{key[len(module) :]}"] = tensors[key]
    sites = {m: site for f in found.values() for m, site in f.sites.items()}
    updates = {m: layer.adapters[name].updates for m, layer in layers.items()}
    targets: list[str] = list(sites)
    if method.in_place:
        trained = {v.module for v in stored.values() if method.trains(v, fields)}
        targets = sorted(m for m in trained if not any(is_below(m, full) for full in modules))
    config = make_peft_config(model_name(model), fields, targets, sites, updates, modules)
    _warn_if_peft_differs(found, layers, fields, config)
    lora = split_lora_values(config_to_dict(state.fields[name]))[0]
    # A variant of a user's own may have only some of the fields.
    lora = {k: v for k, v in lora.items() if hasattr(own_config(model), k)}
    # The kernels are the model's, also for an adapter that was added later.
    lora |= {k: getattr(own_config(model), k) for k in KERNEL_ARGUMENTS if k in lora}
    if "lora_train_classifier" in lora:
        lora["lora_train_classifier"] = any(m in classifier_of(model) for m in modules)
    own = {
        "version": __version__,
        "model": model_name(model),
        "base_sha256": base_hash(model, name),
        "lora": lora,
        "config": config,
    }
    target = Path(folder) if folder_name == "default" else Path(folder) / folder_name
    # The weights carry the config as well: between the two renames they alone are the adapter.
    write_safetensors(
        target / WEIGHTS_FILE,
        {
            (SHARED_PREFIX if key in method.peft_shared else PREFIX) + key: value.astype(np.float32)
            for key, value in tensors.items()
        },
        {"format": "pt", METADATA: json.dumps(own)},
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_aside(target / CONFIG_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    write_card(target, adapter_card(model, name))
    return target


def _warn_if_peft_differs(
    found: Mapping[str, LayerTensors], layers: Mapping[str, Any], fields: Any, config: Any
) -> None:
    """Says which part of an adapter PEFT does not have."""
    method = METHODS[fields.lora_method]
    if method.peft_type is None:
        warnings.warn(
            f"PEFT has no method {fields.lora_method!r}, so only tfimm_lora reads this adapter.",
            stacklevel=3,
        )
        return
    apart = [m for m, f in found.items() if not f.known]
    if apart:
        warnings.warn(
            f"PEFT's format has no {fields.lora_method} adapter of slices, so those of {apart[0]} "
            "get keys of their own, which only tfimm_lora reads. Adapt the whole layer for PEFT.",
            stacklevel=3,
        )
    strange = [m for m, la in layers.items() if not adapts(method.peft_type, la)]
    if strange:
        warnings.warn(
            f"PEFT's {method.peft_type} has no adapters for layers such as {strange[0]}, so it "
            "will refuse this one. tfimm_lora reads it.",
            stacklevel=3,
        )
    depthwise = [m for m, la in layers.items() if isinstance(la, keras.layers.DepthwiseConv2D)]
    if depthwise and method.peft_type == "LORA" and not fields.lora_options.get("mix_channels"):
        warnings.warn(
            "PEFT has no mergeable adapter for depthwise convolutions, so it will refuse "
            f"{depthwise[0]} and its like. tfimm_lora reads the adapter.",
            stacklevel=3,
        )
    if "bias" in config and "bias" not in KNOWN[method.peft_type]:
        warnings.warn(
            f"PEFT's {method.peft_type} trains no biases, so it drops those of this adapter "
            f"(lora_train_bias={fields.lora_train_bias!r}). tfimm_lora reads them.",
            stacklevel=3,
        )


def load_adapter(
    model: keras.Model,
    folder_or_hub_id: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    rewritten_base: bool = False,
) -> keras.Model:
    """Loads an adapter that this package or PEFT saved.

    Args:
        model: A regular model, which is converted as the adapter says and not changed; or a LoRA
            model with the adapter's targets and ranks, whose weights are replaced in place.
        folder_or_hub_id: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``,
            or ``hf-hub:org/repo`` (``hf-hub:org/repo@revision``; the prefix may be left out).
        name: Name of the adapter; any other than ``default`` is looked for in the folder of this
            name inside ``folder_or_hub_id`` first. Defaults to ``default``.
        check_base: Refuse a model whose frozen weights are not those the adapter was trained on
            (recorded by this package, not by PEFT). Defaults to ``True``.
        rewritten_base: Whether the model has the base weights that an initialisation of PEFT
            (``init_lora_weights`` such as ``pissa``) left. Defaults to ``False``: it has those
            from before.

    Returns:
        The LoRA model.

    Raises:
        FileNotFoundError: There is no such folder or file.
        OSError: The hub cannot be reached.
        ValueError: The adapter cannot be read, belongs to another model or other weights, or its
            tensors do not fit.

    Example:
        >>> model = load_adapter(tfimm_lora.create_model("convnext_tiny"), "my_adapter")
    """
    if isinstance(model, FeatureExtractor):
        adapted = load_adapter(
            model.backbone,
            folder_or_hub_id,
            name,
            check_base=check_base,
            rewritten_base=rewritten_base,
        )
        return model if adapted is model.backbone else model.replace_backbone(adapted)
    check_adapter_name(name)
    adapter = read_adapter(folder_or_hub_id, name, model, rewritten_base)
    check_classes(model, adapter)
    try:
        return _loaded(model, name, adapter, check_base)
    except (ValueError, TypeError) as error:
        mine, theirs = model_name(model), adapter.own.get("model", "")
        if theirs and theirs != mine and theirs not in str(error):
            raise ValueError(
                f"{adapter.source} is an adapter of {theirs!r}, this model is {mine!r}: {error}"
            ) from error
        raise


def _loaded(model: Any, name: str, adapter: AdapterFile, check_base: bool) -> keras.Model:
    """Loads what has been read."""
    if not (isinstance(model, KeepsAdapters) or lora_layers(model)):
        from tfimm_lora.lora.factory import convert_to_lora_model

        fields = adapter.fields
        if name != "default" or "lora_adapter_name" in fields:
            fields = {**fields, "lora_adapter_name": name}
        lora_model: Any = convert_to_lora_model(model, **fields)
        fill_adapter(lora_model, name, adapter, check_base)
        return lora_model
    state = adapter_state(model)
    state.check_open(model)
    if name in state.fields:
        check_same(state.fields[name], adapter)
        fill_adapter(model, name, adapter, check_base)
        return model
    state.add(
        model, name, make_config(LoRAConfig, {}, {**adapter.fields, "lora_adapter_name": name})
    )
    try:
        fill_adapter(model, name, adapter, check_base)
    except Exception:
        state.delete(model, name)
        raise
    return model


def _chosen(state: AdapterState, name: str) -> str:
    """The adapter that is meant; a model's only one may be saved under any name."""
    if name in state.fields:
        return name
    if len(state.fields) == 1:
        return next(iter(state.fields))
    raise ValueError(f"The model has no adapter {name!r}. It has {', '.join(state.fields)}.")
