"""Adapters of the library transformers' models: their modules' names, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tfimm_lora.weights.foreign import hf_clip, hf_convnext, hf_dinov2, hf_vit
from tfimm_lora.weights.foreign.view import renamed

# What transformers 5 calls modules; its checkpoints still have the older names of the rules above.
_NEWER = [
    (r"^layers\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
]
_FAMILIES = [
    (r"^(?:vit|deit|ijepa)\.|^(?:cls_|distillation_)?classifier\.|^(?:encoder\.layer|layers)\.\d",
     [*hf_vit.RULES, *_NEWER]),
    (r"^dinov2(?:_with_registers)?\.", [*hf_dinov2.RULES, *_NEWER]),
    (r"^vision_model\.|^encoder\.layers\.\d", hf_clip.RULES),
    (r"^convnext(?:v2)?\.|^encoder\.stages\.\d", hf_convnext.RULES),
]  # fmt: skip
# Modules of one layer of an encoder, by the ways in which transformers has named them.
_OLDER_LEAVES = (
    "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before",
    "layernorm_after", "norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.weights_in", "mlp.weights_out",
)  # fmt: skip
_LEAVES = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
    "layernorm_before", "layernorm_after", "norm1", "norm2", "mlp.fc1", "mlp.fc2",
    "mlp.weights_in", "mlp.weights_out",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "layer_norm1", "layer_norm2", "dwconv", "layernorm", "pwconv1", "pwconv2",
)  # fmt: skip
_CONTAINER = re.compile(r"^(.*?(?:encoder\.layers?|encoder\.stages|layers)\.)\d+\.")
_OTHERS = (
    "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings", "layernorm",
    "embeddings.patch_embedding", "post_layernorm", "pre_layrnorm", "embeddings.layernorm",
)  # fmt: skip
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def timm_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str] | None:
    """Translates the names of an adapter's tensors, if they are transformers'.

    Args:
        names: Names without PEFT's prefix.
        known: timm paths of the model's modules; a name below one of them needs no translation.

    Returns:
        timm names by the given ones; ``None`` if they are timm's, or unknown.

    Example:
        >>> name = "vit.layers.0.attention.q_proj.lora_A.weight"
        >>> timm_names([name], [])
        {'vit.layers.0.attention.q_proj.lora_A.weight': 'blocks.0.attn.q.lora_A.weight'}
    """
    names = list(names)
    tops = {name.partition(".")[0] for name in known}
    if not names or any(name.partition(".")[0] in tops for name in names):
        return None
    rules = _rules(names)
    if rules is None:
        return None
    return {old: new for new, old in renamed(names, rules).items()}


def _rules(names: list[str]) -> list[tuple[str, str]] | None:
    # The encoder's name says more than that of the classifier, which many models share.
    found = [i for i, (p, _) in enumerate(_FAMILIES) if any(re.match(p, n) for n in names)]
    return _FAMILIES[max(found)][1] if found else None


def modules_there(names: Iterable[str], here: Mapping[str, str]) -> dict[str, str]:
    """Lists the modules that transformers' model has, as far as this one has them.

    Args:
        names: Names of the adapter's tensors there, which say how modules are named.
        here: Kinds of this model's modules, see :func:`~.targets.module_kinds`, with
            the slices of fused layers.

    Returns:
        timm paths by the names there.
    """
    names = list(names)
    containers = sorted({m[1] for n in names if (m := _CONTAINER.match(n))})
    prefix = re.split(r"encoder\.|layers\.", containers[0])[0] if containers else ""
    older = any(
        re.search(r"attention\.attention\.|(output|intermediate)\.dense\.", n) for n in names
    )
    depth = 1 + max([int(m[1]) for n in here if (m := re.match(r"blocks\.(\d+)", n))], default=-1)
    there = [f"{prefix}{name}" for name in _OTHERS] + list(_HEADS)
    leaves = _OLDER_LEAVES if older else _LEAVES
    for container in containers:
        if container.endswith("stages."):
            there += _convnext_modules(container, here)
        else:
            there += [f"{container}{i}.{leaf}" for i in range(depth) for leaf in leaves]
    rules = _rules(names) or []
    found = {old: new.rstrip(".") for new, old in renamed([f"{n}." for n in there], rules).items()}
    return {old.rstrip("."): new for old, new in found.items() if new in here}


def _convnext_modules(container: str, here: Mapping[str, str]) -> list[str]:
    found = []
    for name in here:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)$", name):
            inside = f"{container}{match[1]}.layers.{match[2]}"
            found += [f"{inside}.{leaf}" for leaf in ("dwconv", "layernorm", "pwconv1", "pwconv2")]
        elif match := re.match(r"stages\.(\d+)\.downsample\.(\d+)$", name):
            found.append(f"{container}{match[1]}.downsampling_layer.{match[2]}")
    return found
