"""Writes this folder's tables from an installed timm: ``python .../variants/from_timm.py``.

For maintainers. It runs in an environment that has timm, as a file and not as a module, because
``import tfimm_lora`` needs Keras, which that environment need not have. Nothing is downloaded, and
no weight is allocated: arguments are noted instead of building a model, and weights are counted on
torch's ``meta`` device.

What timm passes to its classes has to be known here, name and value: a knob that a new timm adds
is an error that names the architecture, rather than a model that silently differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

MODULES = ("convnext", "vision_transformer", "deit")

# The facts and their defaults; the file needs the standard library alone.
_FACTS = runpy.run_path(str(Path(__file__).parents[1] / "pretrained.py"))["PretrainedConfig"]

# --- Constructor arguments --------------------------------------------------------------------

_RENAMED = {"num_classes": "nb_classes", "in_chans": "in_channels", "img_size": "input_size"}

# Arguments that our configurations have under timm's name, with timm's values.
_CONVNEXT = """depths dims kernel_sizes ls_init_value stem_type conv_mlp use_grn norm_eps
    head_norm_first head_hidden_size"""
_VIT = """patch_size embed_dim depth num_heads mlp_ratio qkv_bias qk_norm scale_attn_norm
    scale_mlp_norm proj_bias init_values class_token no_embed_class reg_tokens pre_norm final_norm
    fc_norm global_pool pool_include_prefix dynamic_img_size attn_layer"""
_COPIED = {
    "ConvNeXt": frozenset(_CONVNEXT.split()),
    "VisionTransformer": frozenset(_VIT.split()),
    "VisionTransformerDistilled": frozenset(_VIT.split()),
}

# timm names layers by class or by string.
_ACTIVATIONS = {
    "GELU": "gelu",
    "SiLU": "silu",
    "silu": "silu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_NORMS = {
    "LayerNorm": "layernorm",
    "RmsNorm": "rmsnorm",
    "rmsnorm": "rmsnorm",
    "rmsnorm2d": "rmsnorm",
    "simplenorm": "simplenorm",
}
_BLOCKS = {
    "Block",
    "ResPostBlock",
    "ParallelScalingBlock",
    "DiffParallelScalingBlock",
    "ParallelThingsBlock",
}
# timm's interpolation, antialias and align_corners, as pos_embed_interpolation.
_RESIZING = {
    ("bicubic", True, False): "bicubic",
    ("bilinear", False, False): "bilinear",
    ("bilinear", False, True): "bilinear_align_corners",
}


class _Noted(Exception):
    """Thrown in place of building a model."""


@dataclasses.dataclass
class Build:
    """What timm was about to build.

    Attributes:
        model_class: Name of the class.
        arguments: Its constructor's arguments.
        resizing: Keyword arguments of timm's checkpoint filter.
    """

    model_class: str
    arguments: dict[str, Any]
    resizing: dict[str, Any]


def note_build(name: str) -> Build:
    """Returns what ``timm.create_model(name)`` hands to the model's class.

    Args:
        name: ``arch`` or ``arch.tag``.

    Example:
        >>> note_build("vit_tiny_patch16_224").arguments["embed_dim"]
        192
    """
    import timm
    from timm.models import model_entrypoint

    module = sys.modules[model_entrypoint(name).__module__]
    original = module.build_model_with_cfg
    noted: list[Build] = []

    def note(model_class: type, *args: Any, **kwargs: Any) -> None:
        checkpoint_filter = kwargs.get("pretrained_filter_fn")
        options = getattr(checkpoint_filter, "keywords", {})

        def constructor(**arguments: Any) -> None:
            noted.append(Build(model_class.__name__, arguments, options))
            raise _Noted

        original(constructor, *args, **kwargs)

    with mock.patch.object(module, "build_model_with_cfg", note):
        try:
            timm.create_model(name)
        except _Noted:
            return noted[0]
    raise ValueError(f"timm built {name!r} in a way that this script does not know.")


def _layer(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and bound arguments of what timm was given as a layer: a string, a class, a partial."""
    if isinstance(value, functools.partial):
        return value.func.__name__, dict(value.keywords)
    return (value if isinstance(value, str) else value.__name__), {}


def _norm(value: Any) -> dict[str, Any]:
    """``norm_layer`` and ``norm_eps``, as far as they differ from layer normalisation with 1e-6."""
    name, options = _layer(value)
    kind = _NORMS[name]
    fields: dict[str, Any] = {} if kind == "layernorm" else {"norm_layer": kind}
    if "eps" in options:
        fields["norm_eps"] = options.pop("eps")
    if options:
        raise KeyError(name)
    return fields


def _mlp(value: Any, arguments: dict[str, Any]) -> str:
    """``mlp_layer``; a packed gated MLP has to have its gate first, and the block's activation."""
    name, options = _layer(value)
    if name == "GluMlp":
        bound = _layer(options.pop("act_layer"))[0]
        own = _layer(arguments["act_layer"])[0]
        if options != {"gate_last": False} or _ACTIVATIONS[bound] != _ACTIVATIONS[own]:
            raise KeyError(name)
    return {"Mlp": "mlp", "GluMlp": "glu", "SwiGLU": "swiglu"}[name]


def _embed_norm(value: Any, arguments: dict[str, Any]) -> str:
    """``embed_norm_layer``; it has to have the epsilon of the other norms."""
    own, others = _layer(value)[1], _layer(arguments["norm_layer"])[1]
    if own != others:
        raise KeyError(value)
    return _NORMS[_layer(value)[0]]


def _fields(key: str, value: Any, build: Build) -> dict[str, Any]:
    """The fields of our configuration that say what one argument of timm's says."""
    if key in _RENAMED:
        pair = key == "img_size" and isinstance(value, int)
        return {_RENAMED[key]: [value, value] if pair else value}
    if key == "act_layer":
        return {key: _ACTIVATIONS[_layer(value)[0]]}
    if key == "norm_layer":
        return _norm(value)
    if build.model_class != "ConvNeXt":
        if key == "mlp_layer":
            return {key: _mlp(value, build.arguments)}
        if key == "embed_norm_layer":
            return {key: _embed_norm(value, build.arguments)}
        if key == "block_fn" and value.__name__ in _BLOCKS:
            return {key: value.__name__}
    if key in _COPIED[build.model_class] and json.dumps(value):
        return {key: value}
    raise KeyError(key)


def _resizing(options: dict[str, Any]) -> str:
    """``pos_embed_interpolation``, from the options of timm's checkpoint filter."""
    interpolation = options.get("interpolation", "bicubic")
    antialias = options.get("antialias", True)
    return _RESIZING[interpolation, antialias, bool(options.get("align_corners", False))]


def config_row(name: str) -> dict[str, Any]:
    """Returns the fields of our configuration of an architecture, in JSON's types.

    Args:
        name: timm's name of the architecture, without tag.

    Raises:
        ValueError: timm passes something that the tables do not know.

    Example:
        >>> config_row("deit_tiny_distilled_patch16_224")["distilled"]
        True
    """
    from timm.models import get_pretrained_cfg

    build = note_build(name)
    row: dict[str, Any] = {}
    for key, value in build.arguments.items():
        try:
            row |= _fields(key, value, build)
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"timm gives {name} the argument {key}={value!r}, which the tables do not know: "
                f"teach {Path(__file__).name} and the configuration what it means."
            ) from error
    if build.model_class == "VisionTransformerDistilled":
        row["distilled"] = True
    if build.model_class == "ConvNeXt":  # takes images of any size; this is that of its training
        row["input_size"] = get_pretrained_cfg(name).input_size[1:]
    try:
        interpolation = _resizing(build.resizing)
    except KeyError as error:
        raise ValueError(
            f"timm resizes checkpoints of {name} by {build.resizing}, which the tables do not know."
        ) from error
    if interpolation != "bicubic":
        row["pos_embed_interpolation"] = interpolation
    return json.loads(json.dumps(row))


# --- Checkpoints ------------------------------------------------------------------------------


def _facts(cfg: Any) -> dict[str, Any]:
    """The facts of a checkpoint that differ from the defaults."""
    row = {}
    for field in dataclasses.fields(_FACTS):
        value = getattr(cfg, field.name)
        if field.name == "has_weights":  # an address in timm
            value = bool(value)
        if field.name == "url" and cfg.hf_hub_id:
            continue  # of the original file, which the hub's copy stands in for
        unknown = value is None or value == ""
        if field.name not in ("architecture", "tag") and not unknown and value != field.default:
            row[field.name] = value
    return json.loads(json.dumps(row))


def tag_rows(name: str) -> dict[str, dict[str, Any]]:
    """Returns the facts of all checkpoints of an architecture, by tag, the default one first.

    Args:
        name: timm's name of the architecture, without tag.

    Raises:
        ValueError: A tag changes more of the model than its classes and its image size.

    Example:
        >>> list(tag_rows("deit_tiny_patch16_224"))
        ['fb_in1k']
    """
    from timm.models import get_arch_pretrained_cfgs

    rows: dict[str, dict[str, Any]] = {}
    default = note_build(name)
    for full_name, cfg in get_arch_pretrained_cfgs(name).items():
        build = note_build(full_name)
        expected = default.arguments | {"num_classes": cfg.num_classes}
        if "img_size" in default.arguments and not isinstance(default.arguments["img_size"], int):
            expected["img_size"] = tuple(cfg.input_size[1:])
        if str(build) != str(dataclasses.replace(default, arguments=expected)):
            raise ValueError(
                f"timm builds {full_name} with {build.arguments}, the tables expect {expected}."
            )
        rows[cfg.tag] = _facts(cfg)
    return rows


# --- Tables -----------------------------------------------------------------------------------


def count_parameters(name: str) -> int:
    """Returns the number of weights of an architecture with the head of its default checkpoint.

    Args:
        name: timm's name of the architecture.

    Example:
        >>> count_parameters("convnext_atto")
        3695560
    """
    import timm
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def _repaired(name: str, tables: dict[str, dict[str, Any]]) -> str:
    """``arch.tag`` with a tag that exists: timm's new names lag behind its tags (sam, sam_in1k)."""
    architecture, _, tag = name.partition(".")
    tags = next(table[architecture]["tags"] for table in tables.values() if architecture in table)
    if not tag or tag in tags:
        return name
    (longer,) = (known for known in tags if known.startswith(f"{tag}_"))
    return f"{architecture}.{longer}"


def make_tables() -> dict[str, dict[str, Any]]:
    """Returns the content of the files, by their names without ``.json``.

    Example:
        >>> sorted(make_tables())
        ['convnext', 'deit', 'retired_names', 'source', 'vision_transformer']
    """
    import timm
    from timm.models import get_deprecated_models

    tables: dict[str, dict[str, Any]] = {}
    retired: dict[str, str] = {}
    for module in MODULES:
        tables[module] = {
            name: {
                "parameters": count_parameters(name),
                "config": config_row(name),
                "tags": tag_rows(name),
            }
            for name in sorted(timm.list_models(module=module))
        }
        retired |= {old: new for old, new in get_deprecated_models(module).items() if new}
    retired = {old: _repaired(new, tables) for old, new in sorted(retired.items())}
    checkpoints = [
        facts
        for module in MODULES
        for row in tables[module].values()
        for facts in row["tags"].values()
    ]
    tables["retired_names"] = retired
    tables["source"] = {
        "timm": timm.__version__,
        "origin": "https://github.com/huggingface/pytorch-image-models (Apache-2.0)",
        "script": f"python tfimm_lora/architectures/variants/{Path(__file__).name}",
        "architectures": sum(len(tables[module]) for module in MODULES),
        "checkpoints": len(checkpoints),
        "checkpoints_with_weights": sum(f.get("has_weights", True) for f in checkpoints),
    }
    return tables


def write_tables(folder: Path) -> None:
    """Writes the tables, one line per architecture, sorted, so that a diff shows what changed.

    Args:
        folder: Where the files go.

    Example:
        >>> write_tables(Path("."))
    """
    for name, table in make_tables().items():
        lines = [
            f"{json.dumps(key)}: {json.dumps(row, separators=(',', ':'))}"
            for key, row in table.items()
        ]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        Path(folder, f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    write_tables(parser.parse_args().folder)
