"""What a model's name and ``pretrained=`` mean: architecture, configuration, weights."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from tfimm_lora.architectures.config import (
    TIMM_SPELLINGS,
    config_to_dict,
    field_names,
    make_config,
)
from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.models.registry import find_entry, model_config, pretrained_config
from tfimm_lora.weights.hub import (
    FOLDER_PREFIX,
    HUB_PREFIX,
    Checkpoint,
    find_checkpoint,
    find_config,
    split_source,
)

# Arguments of timm's constructors that change nothing in a model that is given all its weights.
_WITHOUT_EFFECT = {
    "cache_dir",
    "device",
    "dtype",
    "fix_init",
    "head_init_scale",
    "patch_drop_rate",
    "strict_img_size",
    "weight_init",
}
# Those that no model here can change, with the value that they have.
_ONLY_VALUES = {"conv_bias": True, "output_stride": 32, "pos_embed": "learn"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        entry: The registered architecture.
        cfg: Configuration of the regular model, as its checkpoint has it.
        facts: What is known about the checkpoint.
        path: Weights to load, ``None`` for none.
    """

    entry: Any
    cfg: Any
    facts: PretrainedConfig
    path: Path | None = None


def architecture_of(model_name: str) -> str:
    """Returns the registered name of a model; one on the hub or in a folder says it itself.

    Args:
        model_name: A registered name, ``hf-hub:org/repo`` or ``local-dir:folder``.

    Raises:
        ValueError: The name is unknown.
        OSError: The ``config.json`` cannot be had.
    """
    prefix, _ = split_source(model_name)
    return find_config(model_name)[0].architecture if prefix else model_name


def resolve_source(model_name: str, pretrained: bool | str = False) -> Source:
    """Finds out what ``create_model(model_name, pretrained)`` asks for, and fetches it.

    Args:
        model_name: A registered name with or without tag, ``hf-hub:org/repo[@revision]`` or
            ``local-dir:folder``.
        pretrained: As for ``create_model``.

    Returns:
        Architecture, configuration, facts and, if weights are wanted, their file.

    Raises:
        ValueError: A name or tag is unknown, or name and ``pretrained`` contradict each other.
        OSError: Weights cannot be found or downloaded.
    """
    prefix, _ = split_source(model_name)
    if prefix:
        if isinstance(pretrained, str):
            raise ValueError(
                f"{model_name!r} names its weights already, and pretrained={pretrained!r} names "
                "others. Use pretrained=True."
            )
        if pretrained:
            checkpoint = find_checkpoint(model_name)
            return _from_checkpoint(checkpoint, checkpoint.path)
        return _from_checkpoint(Checkpoint(Path(), *find_config(model_name)), None)
    if "/" in model_name or os.sep in model_name:
        raise ValueError(
            f"{model_name!r} is no name of a model. For a repository on the hub write "
            f"{HUB_PREFIX + model_name!r}, for a folder {FOLDER_PREFIX + model_name!r}."
        )
    entry, tag = find_entry(model_name)
    name = f"{entry.name}.{tag}" if tag else entry.name
    if not pretrained:
        return Source(entry, model_config(name), pretrained_config(name))
    checkpoint = _find_pretrained(entry.name, tag, pretrained)
    return _from_checkpoint(checkpoint, checkpoint.path, name)


def _from_checkpoint(checkpoint: Checkpoint, path: Path | None, name: str = "") -> Source:
    """Fits an architecture's configuration to what a checkpoint says about itself."""
    facts = checkpoint.pretrained_cfg
    entry, _ = find_entry(name or facts.architecture)
    facts.architecture = entry.name  # a config.json can have a name that timm has given up
    # timm leaves the licence out of config.json; what was made of its weights keeps their tag.
    facts.license = facts.license or entry.tags.get(facts.tag, {}).get("license") or ""
    channels, height, width = facts.input_size
    cfg = dataclasses.replace(
        model_config(name or entry.name),
        nb_classes=facts.num_classes,
        in_channels=channels,
        input_size=(height, width),
    )
    cfg = _with_model_args(cfg, checkpoint.model_args)
    return Source(entry, cfg, facts, path)


def _with_model_args(cfg: Any, arguments: dict[str, Any]) -> Any:
    """Applies the arguments of a timm ``config.json``."""
    known = {*field_names(type(cfg)), *TIMM_SPELLINGS}
    applied = {}
    for key, value in arguments.items():
        if key in known:
            applied[key] = _plain_norm(value) if key.endswith("norm_layer") else value
        elif key in _ONLY_VALUES and value != _ONLY_VALUES[key]:
            raise ValueError(
                f"The checkpoint's config.json asks for {key}={value!r}; models here have "
                f"{key}={_ONLY_VALUES[key]!r} only."
            )
        # Options that are off need not be known; others are errors that name them.
        elif key not in {*_WITHOUT_EFFECT, *_ONLY_VALUES} and value not in (None, False, ""):
            applied[key] = value
    return make_config(type(cfg), config_to_dict(cfg), applied)


def _plain_norm(name: Any) -> Any:
    """Makes timm's ``layernorm2d`` a ``layernorm``: only their orders of axes differ."""
    return re.sub(r"2d$", "", name) if isinstance(name, str) else name


def _find_pretrained(architecture: str, tag: str, wanted: bool | str) -> Checkpoint:
    """Resolves the argument ``pretrained`` to a weights file."""
    if wanted is True:
        return find_checkpoint(pretrained_config(f"{architecture}.{tag}" if tag else architecture))
    source = str(wanted)
    prefix, _ = split_source(source)
    if not prefix and not Path(source).is_dir():
        if "/" in source or os.sep in source:
            raise FileNotFoundError(
                f"pretrained={source!r}: there is no such folder. For a repository on the hub use "
                f"pretrained='{HUB_PREFIX}org/repo', for a single file model_path=FILE."
            )
        if tag and tag != source:
            raise ValueError(f"The name has the tag {tag!r} and pretrained={source!r} is another.")
        return find_checkpoint(pretrained_config(f"{architecture}.{source}"))
    facts, _ = find_config(source)
    found = find_entry(facts.architecture)[0].name
    if found != architecture:
        raise ValueError(
            f"{source} holds weights of {found!r}, not of {architecture!r}. Use "
            f"create_model({found!r}, pretrained={source!r})."
        )
    return find_checkpoint(source)
