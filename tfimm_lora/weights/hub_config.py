"""The ``config.json`` that timm writes beside weights, read as timm reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tfimm_lora.architectures.pretrained import PretrainedConfig

# Facts about where a file is or what it is for do not come from its content.
_NOT_READ = {"architecture", "tag", "hf_hub_id", "hf_hub_filename", "file", "has_weights"}


def read_hub_config(path: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Reads a ``config.json``.

    As in timm, ``num_classes`` at the top goes before that in ``pretrained_cfg``, files of older
    versions without ``pretrained_cfg`` have all facts at the top, and ``model_args`` say what the
    saved model's channels and image size were. ``num_features`` and ``global_pool`` at the top are
    notes for people; a model's pooling is in ``model_args``.

    Args:
        path: The ``config.json``.

    Returns:
        The facts about the checkpoint (``hf_hub_filename`` is ``""`` where the file names none),
        and the constructor arguments, in timm's spelling, in which the checkpoint's model differs
        from its architecture.

    Raises:
        ValueError: The file is no JSON, names no architecture, or has a field of another form.
    """
    config = _read(path)
    known = {f.name for f in dataclasses.fields(PretrainedConfig)} - _NOT_READ
    try:
        # In a file without pretrained_cfg, everything is a fact.
        facts = dict(config if config.get("pretrained_cfg") is None else config["pretrained_cfg"])
        if config.get("num_classes") is not None:
            facts["num_classes"] = config["num_classes"]
        arguments = dict(config.get("model_args") or {})
        values = {k: _tuple(v) for k, v in facts.items() if k in known and v is not None}
        _check(values)
        _add_arguments(values, arguments)
        cfg = PretrainedConfig(
            architecture=config["architecture"].split(".")[0],
            tag=facts.get("tag") or "",
            hf_hub_filename=facts.get("hf_hub_filename") or "",
            **values,
        )
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} has a field of an unexpected form: {error}.") from error
    if not cfg.tag and "." in config["architecture"]:
        cfg.tag = config["architecture"].partition(".")[2]
    return cfg, arguments


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a timm config.json: it cannot be read as JSON ({error}). Delete it and "
            "fetch or copy it again."
        ) from error
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        return config
    found = ""
    if isinstance(config, dict) and (config.get("architectures") or config.get("model_type")):
        kind = (config.get("architectures") or [config.get("model_type")])[0]
        found = (
            f" It describes a {kind} of the library transformers. If timm has the same "
            "architecture (tfimm_lora.list_models()), pass its name and "
            "model_path='.../model.safetensors'."
        )
    raise ValueError(f"{path} is not a timm config.json with a field 'architecture'.{found}")


def _check(values: dict[str, Any]) -> None:
    """Raises if numbers that a model or its images depend on are none."""
    for key, value in values.items():
        if key.endswith("input_size") and key != "fixed_input_size":
            if len(value) != 3 or not all(isinstance(n, int) and n > 0 for n in value):
                raise ValueError(f"{key}={value!r} is not [channels, height, width]")
        elif key == "num_classes" and not (isinstance(value, int) and value >= 0):
            raise ValueError(f"{key}={value!r} is no number of classes")
        elif key in ("mean", "std") and not all(isinstance(n, (int, float)) for n in value):
            raise ValueError(f"{key}={value!r} is not one number per channel")


def _add_arguments(values: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Lets the arguments of the saved model correct the facts, as timm does."""
    if arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False:
        values["fixed_input_size"] = False
    sizes = [k for k in values if k.endswith("input_size") and k != "fixed_input_size"]
    channels = arguments.get("in_chans")
    if channels is not None:
        for key in {*sizes, "input_size"}:
            values[key] = (channels, *values.get(key, (3, 224, 224))[1:])
    size = arguments.get("img_size")
    if size is not None and values.get("fixed_input_size"):
        height, width = (size, size) if isinstance(size, int) else size
        values["input_size"] = (values.get("input_size", (3,))[0], height, width)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
