"""Saving what LoRA training changed, in PEFT's files, and loading it again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfimm_lora.architectures.config import base_config_values, classifier_paths, config_to_dict
from tfimm_lora.lora import peft_files
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.layers import LoRADepthwiseConv2D
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.trainable import fully_trained_layers
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.version import __version__
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.download import download
from tfimm_lora.weights.loading import classes_of
from tfimm_lora.weights.names import (
    NamedVariable,
    is_lora_weight,
    iterate_layers,
    named_variables,
    timm_path,
    variable_value,
)
from tfimm_lora.weights.safetensors_file import read_safetensors, write_aside, write_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA = "tfimm_lora"
# What PEFT stores beside head.bias with bias="all", and itself ignores.
_DUPLICATES = re.compile(r"\.(original_module|modules_to_save)\.")


def save_adapter(model: keras.Model, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Saves low-rank factors, trained biases and fully trained layers in PEFT's format.

    PEFT loads the folder onto the same timm model with ``PeftModel.from_pretrained``. Each file is
    written aside and then renamed; whenever saving is interrupted, what can be loaded is the old
    adapter or the new one.

    Args:
        model: A LoRA model, merged or not.
        folder: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: Name of the adapter; any other than ``default`` gets a folder of this name inside
            ``folder``, as in PEFT. Defaults to ``default``.

    Returns:
        The folder with the two files.

    Raises:
        ValueError: The model has no LoRA layers.

    Example:
        >>> save_adapter(model, "my_adapter")
    """
    # An adapter fits the backbone of an extractor, with or without the extractor.
    model = model.backbone if isinstance(model, FeatureExtractor) else model
    layers = _lora_layers_by_module(model)
    if not layers:
        raise ValueError(f"{model.name!r} has no LoRA layers, so there is no adapter to save.")
    depthwise = [m for m, layer in layers.items() if isinstance(layer, LoRADepthwiseConv2D)]
    if depthwise:
        warnings.warn(
            f"PEFT has no mergeable adapter for depthwise convolutions, so it will refuse "
            f"{depthwise[0]} and its like. tfimm_lora reads the adapter.",
            stacklevel=2,
        )
    fields = _fields(model)
    tensors: dict[str, np.ndarray] = {}
    for module, layer in layers.items():
        a, b, _, _ = peft_files.layer_to_peft(layer)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    stored = _stored_variables(model)
    tensors |= {key: v.to_timm() for key, v in stored.items()}
    modules = _full_layers(model)
    if fields.lora_train_bias == "all":
        # PEFT then expects the biases of both its copies of a layer that is trained in full.
        for module in modules:
            for key in [k for k in stored if is_below(k, module) and k.endswith(".bias")]:
                for copy in ("original_module", "modules_to_save"):
                    tensors[f"{module}.{copy}{key[len(module) :]}"] = tensors[key]
    config = peft_files.make_config(_model_name(model), fields, layers, modules)
    lora = split_lora_values(config_to_dict(_own_config(model)))[0]
    if "lora_train_classifier" in lora:
        lora["lora_train_classifier"] = any(m in _classifier(model) for m in modules)
    own = {
        "version": __version__,
        "model": _model_name(model),
        "base_sha256": _base_hash(model),
        "lora": lora,
        "config": config,
    }
    target = Path(folder) if name == "default" else Path(folder) / name
    # The weights carry the config as well: between the two renames they alone are the adapter.
    write_safetensors(
        target / WEIGHTS_FILE,
        {peft_files.PREFIX + key: value.astype(np.float32) for key, value in tensors.items()},
        {"format": "pt", _METADATA: json.dumps(own)},
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_aside(target / CONFIG_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    return target


def load_adapter(
    model: keras.Model,
    folder_or_hub_id: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
) -> keras.Model:
    """Loads an adapter that this package or PEFT saved.

    Args:
        model: A regular model, which is converted as the adapter says and not changed; or a LoRA
            model with the adapter's targets and ranks, whose weights are replaced in place.
        folder_or_hub_id: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``,
            or ``org/repo`` (``org/repo@revision``) on the hub.
        name: Name of the adapter; any other than ``default`` is looked for in the folder of this
            name inside ``folder_or_hub_id`` first. Defaults to ``default``.
        check_base: Refuse a model whose frozen weights are not those the adapter was trained on
            (recorded by this package, not by PEFT). Defaults to ``True``.

    Returns:
        The LoRA model.

    Raises:
        FileNotFoundError: There is no such folder or file.
        OSError: The hub cannot be reached.
        ValueError: The adapter is no plain LoRA, belongs to other weights, or its tensors do not
            fit the model.

    Example:
        >>> model = load_adapter(tfimm_lora.create_model("convnext_tiny"), "my_adapter")
    """
    if isinstance(model, FeatureExtractor):
        adapted = load_adapter(model.backbone, folder_or_hub_id, name, check_base=check_base)
        return model if adapted is model.backbone else model.replace_backbone(adapted)
    config_path, weights_path = _find_files(folder_or_hub_id, name)
    with read_safetensors(weights_path) as file:
        own = json.loads(file.metadata.get(_METADATA, "{}"))
        config = _read_config(config_path, own)
        peft_files.check_config(config, str(config_path))
        names = {
            _without_prefix(n, weights_path): n for n in file.shapes if not _DUPLICATES.search(n)
        }
        shapes = {key: file.shapes[n] for key, n in names.items()}
        tensors = {key: file.read(n) for key, n in names.items()}
    if own:
        fields = own["lora"]
    else:
        modules = _modules_to_save(config, shapes)
        fields = peft_files.fields_from_peft(config, shapes, modules)
    lora_model = _adapted(model, fields, shapes, str(weights_path))
    _check_base(lora_model, own, check_base, str(weights_path))
    _check_scaling(lora_model, config, tensors, str(weights_path))
    _assign(lora_model, tensors, str(weights_path))
    return lora_model


def _find_files(source: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    folder = Path(source)
    if not folder.is_dir():
        text = str(source)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) or folder.exists():
            raise FileNotFoundError(
                f"There is no adapter folder {text!r} (and it is no 'org/repo' on the hub)."
            )
        repo, _, revision = text.partition("@")
        inside = "" if name == "default" else f"{name}/"
        files = [download(repo, inside + f, revision or None) for f in (CONFIG_FILE, WEIGHTS_FILE)]
        return files[0], files[1]
    if name != "default" and (folder / name).is_dir():
        folder = folder / name
    for needed in (WEIGHTS_FILE, CONFIG_FILE):
        if (folder / needed).is_file():
            continue
        pickled = (folder / "adapter_model.bin").is_file() and needed == WEIGHTS_FILE
        hint = (
            " adapter_model.bin is a pickle, which can run code when it is opened and is not read; "
            "save the adapter again in PEFT, which writes safetensors."
            if pickled
            else ""
        )
        raise FileNotFoundError(f"The adapter folder {folder} has no {needed}.{hint}")
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _read_config(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object: {error}.") from error
    if own and config != own["config"]:
        warnings.warn(
            f"{path} is not the config that was saved with the weights (it was edited, or saving "
            "was interrupted). The config inside the weights file is used.",
            stacklevel=3,
        )
        return own["config"]
    return config


def _without_prefix(name: str, path: Path) -> str:
    if not name.startswith(peft_files.PREFIX):
        raise ValueError(f"{path}: tensor {name!r} does not start with {peft_files.PREFIX!r}.")
    return name[len(peft_files.PREFIX) :]


def _modules_to_save(config: dict[str, Any], shapes: dict[str, Any]) -> list[str]:
    """Timm paths of the layers that PEFT stored in full."""
    found = []
    for item in config.get("modules_to_save") or []:
        for key in shapes:
            match = re.match(rf"((^|.*\.){re.escape(item)})\.", key)
            if match and ".lora_" not in key and match[1] not in found:
                found.append(match[1])
    return found


def _lora_layers_by_module(model: keras.Model) -> dict[str, Any]:
    return {timm_path(p): la for p, la in iterate_layers(model) if isinstance(la, LoRALayer)}


def _own_config(model: Any) -> Any:
    return model.lora_cfg if hasattr(model, "lora_cfg") else model.cfg


def _fields(model: Any) -> LoRAConfig:
    cfg = _own_config(model)
    if isinstance(cfg, LoRAConfig):
        return cfg
    # A variant of a user's own may have only some of the fields.
    return LoRAConfig(**split_lora_values(base_config_values(cfg, LoRAConfig))[0])


def _model_name(model: Any) -> str:
    facts = getattr(model, "pretrained_cfg", None)
    name = getattr(getattr(model, "cfg", None), "name", "") or model.name
    return f"{name}.{facts.tag}" if facts is not None and facts.tag else name


def _classifier(model: Any) -> tuple[str, ...]:
    return classifier_paths(getattr(model, "cfg", None))


def _full_layers(model: Any) -> list[str]:
    found = getattr(model, "lora_trainable_layers", None)
    return fully_trained_layers(model) if found is None else list(found)


def _stored_variables(model: Any) -> dict[str, NamedVariable]:
    """Weights beside the factors that belong to the adapter, by their key in the file."""
    bias, modules = _fields(model).lora_train_bias, _full_layers(model)
    stored = {}
    for v in named_variables(model):
        adapted = isinstance(v.layer, LoRALayer)
        if is_lora_weight(v.leaf):
            continue
        if any(is_below(v.name, m) for m in modules):
            stored[v.name] = v
        elif v.name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and adapted)):
            stored[f"{v.module}.base_layer.bias" if adapted else v.name] = v
    return stored


def _base_hash(model: Any) -> str:
    """SHA-256 of all weights that the adapter does not store, in unmerged state."""
    stored = {v.path for v in _stored_variables(model).values()}
    digest = hashlib.sha256()
    for v in sorted(named_variables(model), key=lambda v: v.path):
        if v.path in stored or is_lora_weight(v.leaf):
            continue
        if isinstance(v.layer, LoRALayer):
            value = v.layer.unmerged_value(v.variable)
        else:
            value = variable_value(v.variable)
        digest.update(v.name.encode())
        digest.update(np.ascontiguousarray(value, dtype=np.float32).tobytes())
    return digest.hexdigest()


def _adapted(
    model: Any, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: str
) -> Any:
    """Returns a LoRA model whose layers are those of the adapter."""
    from tfimm_lora.lora.factory import convert_to_lora_model

    found = classes_of(shapes, _classifier(model))
    classes = getattr(getattr(model, "cfg", None), "nb_classes", None)
    if found and classes is not None and found != classes:
        raise ValueError(
            f"{source}: the adapter's classifier has {found} classes and the model "
            f"{classes}. Create the model with nb_classes={found}."
        )
    lora_model = model if lora_layers(model) else convert_to_lora_model(model, **fields)
    if any(layer.merged for layer in lora_layers(lora_model)):
        raise ValueError("The model's LoRA weights are merged. Call unmerge_lora_weights first.")
    if lora_model is model:
        _check_same(model, fields, source)
    return lora_model


def _check_same(model: Any, fields: dict[str, Any], source: str) -> None:
    """Raises if a LoRA model's method or bias mode is not that of the adapter."""
    found = config_to_dict(_fields(model))
    for key in ("lora_method", "lora_train_bias"):
        if key in fields and found[key] != fields[key]:
            raise ValueError(
                f"{source}: the adapter has {key}={fields[key]!r} and the model {found[key]!r}. "
                "Load it onto the regular model, which is converted as the adapter says."
            )


def _check_scaling(
    model: Any, config: dict[str, Any], tensors: dict[str, np.ndarray], source: str
) -> None:
    """Raises if a layer would scale its update otherwise than the adapter says."""
    for module, layer in _lora_layers_by_module(model).items():
        factor = tensors.get(f"{module}.lora_A.weight")
        if factor is None:
            continue
        wanted = peft_files.scaling_of(config, module, factor.shape[0])
        _, _, rank, alpha = peft_files.layer_to_peft(layer)
        found = peft_files.peft_scaling(config, rank, alpha)
        if rank != factor.shape[0] or abs(wanted - found) > 1e-6 * abs(wanted):
            raise ValueError(
                f"{source}: {module} has rank {factor.shape[0]} and scaling {wanted:g} in the "
                f"adapter, rank {rank} and scaling {found:g} in the model. Load the adapter onto "
                "the regular model, which is converted as the adapter says."
            )


def _check_base(model: Any, own: dict[str, Any], check_base: bool, source: str) -> None:
    if own and check_base and own["base_sha256"] != _base_hash(model):
        raise ValueError(
            f"{source}: the adapter was trained on other weights of {own['model']!r} than this "
            f"model ({_model_name(model)!r}) has. Load the weights it was trained on, or pass "
            "check_base=False if you are sure."
        )


def _assign(model: Any, tensors: dict[str, np.ndarray], source: str) -> None:
    """Checks everything, then assigns everything, so that an error leaves the model as it was."""
    layers, stored = _lora_layers_by_module(model), _stored_variables(model)
    expected = set(stored) | {f"{m}.lora_{x}.weight" for m in layers for x in "AB"}
    missing, surplus = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or surplus:
        raise ValueError(
            f"{source}: the adapter does not fit the model. Missing in the adapter: "
            f"{', '.join(missing[:5]) or 'nothing'}. Not in the model: "
            f"{', '.join(surplus[:5]) or 'nothing'}."
        )
    values: list[tuple[Any, np.ndarray]] = []
    for module, layer in layers.items():
        pair = [tensors[f"{module}.lora_{x}.weight"] for x in "AB"]
        by_name = peft_files.layer_from_peft(layer, *pair)
        values += [(w, by_name[w.name]) for w in layer.lora_weights]
    for key, v in stored.items():
        value = v.from_timm(tensors[key])
        if tuple(value.shape) != tuple(v.variable.shape):
            raise ValueError(
                f"{source}: {key} has shape {tuple(value.shape)} in the adapter and "
                f"{tuple(v.variable.shape)} in the model (Keras' layout)."
            )
        values.append((v.variable, value))
    for variable, value in values:
        variable.assign(value)
