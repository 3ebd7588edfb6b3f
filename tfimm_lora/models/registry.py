"""Which models there are: the tables of the package and what users register.

Nothing here imports Keras; a model's class is imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tfimm_lora import architectures
from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.architectures.pretrained import PretrainedConfig

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Table name (timm's module) to the module and name of its model class.
_TABLES = {
    "convnext": ("tfimm_lora.architectures.convnext", "ConvNeXt"),
    "vision_transformer": ("tfimm_lora.architectures.vit", "ViT"),
    "deit": ("tfimm_lora.architectures.vit", "ViT"),
}


@dataclasses.dataclass
class _Entry:
    """One registered architecture; the first tag is the default."""

    name: str
    module: str
    values: dict[str, Any]
    tags: dict[str, dict[str, Any]]
    parameters: int | None = None
    model: tuple[type, Any] | None = None

    def resolve_class(self) -> type:
        if self.model is not None:
            return self.model[0]
        module, name = _TABLES[self.module]
        return getattr(importlib.import_module(module), name)


_registered: dict[str, _Entry] = {}


def _read(table: str) -> dict[str, Any]:
    # importlib.resources would take longer to import than the tables to read.
    file = Path(architectures.__path__[0], "variants", f"{table}.json")
    return json.loads(file.read_bytes())


@functools.cache
def _table() -> dict[str, _Entry]:
    """The package's own tables, read when they are first needed."""
    return {
        name: _Entry(name, module, row["config"], row["tags"], row["parameters"])
        for module in _TABLES
        for name, row in _read(module).items()
    }


def _entries() -> dict[str, _Entry]:
    return {**_table(), **_registered}


@functools.cache
def _other_names() -> dict[str, str]:
    """Names that are no architecture's any more, timm's and tfimm's, to current ones."""
    return {**_read("tfimm_names"), **_read("retired_names")}


def _current_name(model_name: str) -> str:
    """Resolves a name that timm has given up, or that tfimm alone has, as timm resolves it."""
    if split_name(model_name)[0] in _entries():
        return model_name
    current = _other_names().get(model_name)
    if current is None:
        return model_name
    warnings.warn(f"Model {model_name!r} is called {current!r} now.", stacklevel=4)
    return current


def split_name(model_name: str) -> tuple[str, str]:
    """Splits ``arch.tag`` into architecture and tag (``""`` if there is none)."""
    architecture, _, tag = model_name.partition(".")
    return architecture, tag


def find_entry(model_name: str) -> tuple[_Entry, str]:
    """Looks a model up.

    Returns:
        The registered architecture and the tag, ``""`` if the name has none.

    Raises:
        ValueError: The name or the tag is unknown; the nearest ones are suggested.
    """
    architecture, tag = split_name(_current_name(model_name))
    entries = _entries()
    if architecture not in entries:
        raise ValueError(
            f"Unknown model {model_name!r}.{nearest_names(architecture, entries)} "
            "tfimm_lora.list_models() lists all."
        )
    entry = entries[architecture]
    if tag and tag not in entry.tags:
        known = ", ".join(repr(t) for t in entry.tags) or "none"
        raise ValueError(
            f"Model {architecture!r} has no checkpoint tag {tag!r}.{nearest_names(tag, entry.tags)}"
            f" Its tags: {known}."
        )
    return entry, tag


def model_class(model_name: str) -> type:
    """Returns the class of a model.

    Args:
        model_name: A registered name, with or without tag.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> model_class("convnext_tiny").__name__
        'ConvNeXt'
    """
    return find_entry(model_name)[0].resolve_class()


def pretrained_config(model_name: str) -> PretrainedConfig:
    """Returns the facts about a model's checkpoint.

    Args:
        model_name: A registered name; without tag, the default tag's facts.

    Raises:
        ValueError: The name or the tag is unknown.

    Example:
        >>> pretrained_config("convnext_tiny.fb_in1k").license
        'apache-2.0'
    """
    entry, tag = find_entry(model_name)
    tag = tag or next(iter(entry.tags), "")
    if not tag:
        cfg = model_config(model_name)
        return PretrainedConfig(
            architecture=entry.name,
            num_classes=cfg.nb_classes,
            input_size=(cfg.in_channels, *cfg.input_size),
            first_conv=cfg.first_conv,
            classifier=cfg.classifier,
            has_weights=False,
        )
    return PretrainedConfig(**{"architecture": entry.name, "tag": tag, **entry.tags[tag]})


def model_config(model_name: str) -> Any:
    """Returns a fresh configuration of a model.

    A tag can change classes and image size; everything else is the architecture's.

    Args:
        model_name: A registered name, with or without tag.

    Raises:
        ValueError: The name or the tag is unknown.

    Example:
        >>> model_config("convnext_tiny").depths
        (3, 3, 9, 3)
    """
    entry, tag = find_entry(model_name)
    if entry.model is not None:
        cfg = dataclasses.replace(entry.model[1])
    else:
        cfg = entry.resolve_class().cfg_class(name=entry.name, **entry.values)  # type: ignore[attr-defined]
    if tag:
        facts = pretrained_config(f"{entry.name}.{tag}")
        cfg = dataclasses.replace(
            cfg, nb_classes=facts.num_classes, input_size=tuple(facts.input_size[1:])
        )
    return cfg


def is_model(model_name: str) -> bool:
    """Whether a name (with or without tag) is a registered model.

    Example:
        >>> is_model("convnext_tiny")
        True
    """
    try:
        find_entry(model_name)
    except ValueError:
        return False
    return True


def _natural_key(text: str) -> list[Any]:
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", text) if s]


def _filters(patterns: str | list[str] | tuple[str, ...]) -> list[str]:
    return [p for p in ([patterns] if isinstance(patterns, str) else patterns) if p]


def _is_loadable(row: dict[str, Any]) -> bool:
    """Whether a tag's weights can be had: some of timm's exist only as a pickle at some address."""
    return row.get("has_weights", True) and bool(row.get("hf_hub_id") or row.get("file"))


def list_models(
    name_filter: str | list[str] = "",
    module: str = "",
    pretrained: bool = False,
    exclude_filters: str | list[str] = "",
    include_tags: bool = False,
) -> list[str]:
    """Lists the names of models.

    Args:
        name_filter: Wildcards (``*``, ``?``); a name that matches one of them is listed. Defaults
            to all names.
        module: Only models of this module, such as ``convnext``, ``vision_transformer``, ``deit``.
        pretrained: Only models with pretrained weights.
        exclude_filters: Wildcards of names to leave out.
        include_tags: List ``arch.tag`` for every checkpoint instead of architectures.

    Returns:
        The names, sorted, numbers by value.

    Raises:
        ValueError: The module is unknown.

    Example:
        >>> list_models("convnext_tiny*")
        ['convnext_tiny', 'convnext_tiny_hnf']
    """
    modules = list_modules()
    if module and module not in modules:
        raise ValueError(
            f"Unknown module {module!r}.{nearest_names(module, modules)} Modules: "
            f"{', '.join(modules)}."
        )
    names = []
    for entry in _entries().values():
        if module and entry.module != module:
            continue
        tags = [t for t, row in entry.tags.items() if _is_loadable(row)]
        if pretrained and not tags:
            continue
        if include_tags:
            names += [f"{entry.name}.{t}" for t in (tags if pretrained else entry.tags)]
        else:
            names.append(entry.name)
    wanted, unwanted = _filters(name_filter), _filters(exclude_filters)
    if wanted:
        names = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in wanted)]
    names = [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in unwanted)]
    return sorted(names, key=_natural_key)


def list_modules() -> list[str]:
    """Lists the modules that contain models.

    Example:
        >>> list_modules()
        ['convnext', 'deit', 'vision_transformer']
    """
    return sorted({entry.module for entry in _entries().values()})


def register_model(function: _Function) -> _Function:
    """Decorator that registers a user's own model, as in tfimm.

    The function's name is the model's name. It takes nothing and returns the model class and its
    config, and optionally a dictionary from tag to :class:`PretrainedConfig`.

    Args:
        function: The function.

    Returns:
        The function.

    Raises:
        ValueError: The config's name differs from the function's, or the class does not take this
            config.

    Example:
        >>> @register_model
        ... def my_vit():
        ...     return ViT, ViTConfig(name="my_vit", embed_dim=64, depth=2, num_heads=2)
    """
    found: tuple[Any, ...] = function()
    cls, cfg, *rest = found
    name = function.__name__
    cfg_class: Any = getattr(cls, "cfg_class", ())
    if not isinstance(cfg, cfg_class):
        raise ValueError(
            f"{cls.__name__}.cfg_class has to be the class of the registered config "
            f"({type(cfg).__name__})."
        )
    if cfg.name != name:
        raise ValueError(f"The config's name {cfg.name!r} differs from the function's {name!r}.")
    tags: dict[str, PretrainedConfig] = rest[0] if rest else {}
    _registered[name] = _Entry(
        name=name,
        module=function.__module__.rpartition(".")[2],
        values={},
        tags={
            tag: {
                f.name: getattr(facts, f.name)
                for f in dataclasses.fields(facts)
                if f.name not in ("architecture", "tag")
            }
            for tag, facts in tags.items()
        },
        model=(cls, cfg),
    )
    return function


__all__ = [
    "find_entry",
    "is_model",
    "list_models",
    "list_modules",
    "model_class",
    "model_config",
    "pretrained_config",
    "register_model",
]
