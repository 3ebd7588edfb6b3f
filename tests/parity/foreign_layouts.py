"""Writes timm's weights in the layouts of others; runs in the oracle's environment.

Each function takes a timm state dict and returns the tensors as the original publishes them, by
its names, with the parts that are not of the image model (texts, training) beside them. Where an
original holds what timm does not (a position of the class token under registers, a larger table),
it is drawn at random: what becomes of it is for timm's own filter to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

State = dict[str, torch.Tensor]


def _rename(state: State, *rules: tuple[str, str]) -> State:
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def _split_qkv(state: State, pattern: str, names: tuple[str, str, str]) -> State:
    """Replaces every fused tensor whose name matches by three; ``{}`` in names is the leaf."""
    found = {}
    for name, value in state.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            found[name] = value
            continue
        for part, new in zip(value.chunk(3), names, strict=True):
            found[match.expand(new)] = part.clone()
    return found


def _below(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 2


def openai_clip(state: State) -> State:
    """CLIP of OpenAI and OpenCLIP, a whole model with its text tower."""
    state = dict(state)
    state.pop("head.bias", None)
    head = state.pop("head.weight", None)
    state = _rename(
        state,
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^pos_embed$", "positional_embedding"),
        (r"^cls_token$", "class_embedding"),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    )
    state["class_embedding"] = state["class_embedding"][0, 0]
    state["positional_embedding"] = state["positional_embedding"][0]
    if head is not None:
        state["proj"] = head.T.contiguous()
    return {
        **_below(state, "visual."),
        "positional_embedding": _noise(77, 8),
        "text_projection": _noise(8, 8),
        "logit_scale": _noise(1)[0],
        "token_embedding.weight": _noise(20, 8),
        "transformer.resblocks.0.ln_1.weight": _noise(8),
        "transformer.resblocks.0.attn.in_proj_weight": _noise(24, 8),
        "ln_final.weight": _noise(8),
    }


def _texts_of_open_clip() -> State:
    return {
        "logit_scale": _noise(1)[0],
        "logit_bias": _noise(1)[0],
        "text.token_embedding.weight": _noise(20, 8),
        "text.transformer.resblocks.0.ln_1.weight": _noise(8),
        "text.ln_final.weight": _noise(8),
    }


def open_clip_trunk(state: State) -> State:
    """OpenCLIP around a timm model whose classifier is the projection."""
    state = dict(state)
    for head in ("head", "head.fc"):
        if f"{head}.weight" in state:
            projection = state.pop(f"{head}.weight")
            state.pop(f"{head}.bias")
            found = _below(state, "visual.trunk.")
            return {**found, "visual.head.proj.weight": projection, **_texts_of_open_clip()}
    return {**_below(state, "visual.trunk."), **_texts_of_open_clip()}


def open_clip_trunk_mlp(state: State) -> State:
    """OpenCLIP around a ConvNeXt whose head has a hidden layer."""
    state = dict(state)
    head = {
        "visual.head.mlp.fc1.weight": state.pop("head.pre_logits.fc.weight"),
        "visual.head.mlp.fc1.bias": state.pop("head.pre_logits.fc.bias"),
        "visual.head.mlp.fc2.weight": state.pop("head.fc.weight"),
    }
    del state["head.fc.bias"]
    return {**_below(state, "visual.trunk."), **head, **_texts_of_open_clip()}


def meta_dinov2(state: State) -> State:
    """DINOv2 of Meta."""
    state = dict(state)
    width = state["cls_token"].shape[-1]
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = _noise(1, 1, width)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        state = _rename(state, (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
    return {**state, "mask_token": _noise(1, width)}


def tips(state: State) -> State:
    """TIPS v2 of Google: a DINOv2 beside a text encoder."""
    return {
        **_below(meta_dinov2(state), "vision_encoder."),
        "text_encoder.token_embedding.weight": _noise(20, 8),
        "temperature": _noise(1),
    }


def meta_convnext(state: State) -> State:
    """ConvNeXt and ConvNeXt V2 of Meta."""
    found = _rename(
        state,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc", ".pwconv"),
        (r"\.mlp\.grn\.weight$", ".grn.gamma"),
        (r"\.mlp\.grn\.bias$", ".grn.beta"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    for name, value in found.items():
        if ".pwconv" in name and name.endswith("weight"):
            found[name] = value.flatten(1)
        elif ".grn." in name:
            found[name] = value[None, None, None]
    return found


def eupe_convnext(state: State) -> State:
    """EUPE of Meta: a ConvNeXt with the parts that it was distilled with."""
    return {
        **meta_convnext(state),
        "projectors.teacher.weight": _noise(4, 4),
        "norms.0.weight": _noise(4),
    }


def deit3(state: State) -> State:
    """DeiT III of Meta."""
    return _rename(state, (r"\.ls([12])\.gamma$", r".gamma_\1"))


def plain(state: State) -> State:
    """timm's own names: DeiT of Meta."""
    return dict(state)


def flat_vit(state: State) -> State:
    """The first ViT of timm: a dense patch embedding and a layer in front of the classifier."""
    state = dict(state)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    width = state["cls_token"].shape[-1]
    return {
        **state,
        "pre_logits.fc.weight": _noise(width, width),
        "pre_logits.fc.bias": _noise(width),
    }


def beit3(state: State) -> State:
    """BEiT-3 of Microsoft: two branches and a table whose first two rows are not used."""
    state = _split_qkv(
        state,
        r"(blocks\.\d+\.attn)\.qkv\.(\w+)",
        (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"),
    )
    found = _rename(
        state,
        (r"^cls_token$", "beit3.vision_embed.cls_token"),
        (r"^patch_embed\.", "beit3.vision_embed."),
        (r"^pos_embed$", "beit3.encoder.embed_positions.A.weight"),
        (r"^blocks\.(\d+)\.", r"beit3.encoder.layers.\1."),
        (r"\.attn\.([qkv])_proj\.", r".self_attn.\1_proj.A."),
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."),
        (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
        (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."),
        (r"\.mlp\.", ".ffn.A."),
        (r"\.norm1\.", ".self_attn_layer_norm.A."),
        (r"\.norm2\.", ".final_layer_norm.A."),
    )
    table = found["beit3.encoder.embed_positions.A.weight"][0]
    width = table.shape[-1]
    found["beit3.encoder.embed_positions.A.weight"] = torch.cat([_noise(2, width), table])
    texts = {n.replace(".A.", ".B."): v + 1 for n, v in found.items() if ".A." in n}
    return {
        **found,
        **texts,
        "beit3.text_embed.weight": _noise(20, width),
        "beit3.vision_embed.mask_token": _noise(1, 1, width),
    }


def ijepa(state: State) -> State:
    """I-JEPA of Meta: encoder, target encoder and predictor."""
    return {
        **_below(state, "encoder.module."),
        **_below({k: v + 1 for k, v in state.items()}, "target_encoder.module."),
        "predictor.module.predictor_embed.weight": _noise(4, 4),
    }


def aimv2(state: State) -> State:
    """AIMv2 of Apple."""
    return _rename(
        state,
        (r"^patch_embed\.", "preprocessor.patchifier."),
        (r"^pos_embed$", "preprocessor.pos_embed"),
        (r"^norm\.", "trunk.post_trunk_norm."),
        (r"^blocks\.", "trunk.blocks."),
        (r"\.norm([12])\.", r".norm_\1."),
        (r"\.mlp\.fc1_x\.", ".mlp.fc3."),
        (r"\.mlp\.fc1_g\.", ".mlp.fc1."),
    )


def radio(state: State) -> State:
    """RADIO of NVIDIA: dense patches, a table of 128 by 128, class tokens of several teachers."""
    width = state["cls_token"].shape[-1]
    found = {
        "patch_generator.embedder.weight": state["patch_embed.proj.weight"].flatten(1),
        "patch_generator.pos_embed": _noise(1, 128 * 128, width),
        "patch_generator.cls_token.token": torch.cat([state["cls_token"], state["reg_token"]], 1)[
            0
        ],
        **{k: v for k, v in state.items() if k.startswith("blocks.")},
    }
    found = _rename(found, (r"\.gamma$", ".grandma"))
    return {
        **_below(found, "radio_model.model."),
        "radio_model.input_conditioner.norm_mean": _noise(3, 1, 1),
        "radio_model.summary_idxs": torch.tensor([0, 2]),
        "radio_model.model.norm.weight": _noise(width),
    }


LAYOUTS: dict[str, Callable[[State], State]] = {
    f.__name__: f
    for f in (
        openai_clip, open_clip_trunk, open_clip_trunk_mlp, meta_dinov2, tips, meta_convnext,
        eupe_convnext, deit3, plain, flat_vit, beit3, ijepa, aimv2, radio,
    )
}  # fmt: skip


def as_pickled(layout: str, state: State) -> dict[str, Any]:
    """The dictionary that the original's pickle holds, for timm's filter."""
    if layout == "ijepa":
        prefix = "encoder."
        return {"encoder": {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}}
    if layout in ("meta_convnext", "deit3", "plain"):
        return {"model": dict(state)}
    return dict(state)
