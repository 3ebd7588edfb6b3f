"""OpenAI's CLIP and OpenCLIP with CLIP's own vision tower: ``visual.class_embedding``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.weights.foreign.view import Format, Translation, below, renamed

_RULES = [
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^class_embedding$", "cls_token"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def _translate(to: Translation, cfg: Any) -> None:
    tower = below(to.shapes, "visual.")  # the text tower is not needed
    for name, bare in renamed(tower, _RULES).items():
        source = tower[bare]
        if name == "proj":
            # The projection into the space shared with texts is the classifier, without bias.
            to.transpose("head.weight", source)
            to.fill("head.bias", to.shapes[source][1:], 0.0)
        elif name == "cls_token":
            to.reshape(name, source, (1, 1, *to.shapes[source]))
        elif name == "pos_embed":
            to.reshape(name, source, (1, *to.shapes[source]))
        else:
            to.keep(name, source)


CLIP = Format(
    "OpenAI CLIP or OpenCLIP", lambda shapes: "visual.class_embedding" in shapes, _translate
)
