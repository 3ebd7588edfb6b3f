"""Files that the library transformers has saved answer here as they do there.

The models are small and their weights random and far from their start.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import TIMM_TOLERANCE, load, relative_error

SIZE = 32


def vit(**more: Any) -> dict[str, Any]:
    """A small config of one of transformers' vision transformers."""
    return {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "image_size": SIZE,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
        **more,
    }


def convnext(**more: Any) -> dict[str, Any]:
    """A small config of transformers' ConvNeXt."""
    config = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_norm_eps": 1e-6}
    return {**config, "layer_scale_init_value": 0.1, **more}


LABELS = {"id2label": {str(i): str(i) for i in range(5)}}
CLIP = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
DEIT, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
SIGLIP, SIGLIP_GAP = "vit_base_patch32_siglip_256", "vit_base_patch32_siglip_gap_256"
TEXTS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
WITH_TEXTS = {"text_config": {**TEXTS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}}
FEATURES, POOLED, LOGITS = "last_hidden_state", "pooler_output", "logits"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: its class there and its name here, and which answers are compared."""

    model: str
    config: dict[str, Any]
    arch: str
    answers: tuple[str, ...]
    part: str = ""
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.model, self.arch, self.part, self.dtype)))


CASES = [
    Case("ViTModel", vit(), "vit_tiny_patch16_224", (FEATURES,)),
    Case("ViTForImageClassification", vit(**LABELS), "vit_tiny_patch16_224", (LOGITS,)),
    Case("ViTForImageClassification", vit(**LABELS), DEIT, (LOGITS,), "", "float16"),
    Case("ViTForMaskedImageModeling", vit(), "vit_tiny_patch16_224", (FEATURES,), "vit"),
    Case("DeiTModel", vit(), DISTILLED, (FEATURES,)),
    Case("DeiTForImageClassificationWithTeacher", vit(**LABELS), DISTILLED, (LOGITS,)),
    Case("IJepaModel", vit(), "vit_huge_patch14_gap_224", (FEATURES,)),
    Case("IJepaForImageClassification", vit(**LABELS), "vit_huge_patch14_gap_224", (LOGITS,)),
    Case("ViTMAEModel", vit(mask_ratio=0.0), "vit_base_patch16_224", (FEATURES,)),
    Case(
        "ViTMAEForPreTraining",
        vit(mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=16),
        "vit_base_patch16_224", (FEATURES,), "vit",
    ),
    Case("Dinov2Model", vit(), "vit_small_patch14_dinov2", (FEATURES, POOLED)),
    Case("Dinov2Model", vit(), "vit_small_patch14_dinov2", (FEATURES, POOLED), "", "bfloat16"),
    Case("Dinov2Model", vit(use_swiglu_ffn=True), "vit_giant_patch14_dinov2", (FEATURES, POOLED)),
    Case(
        "Dinov2ForImageClassification", vit(**LABELS), "vit_small_patch14_dinov2", (FEATURES,),
        "dinov2",
    ),
    Case("Dinov2WithRegistersModel", vit(), "vit_small_patch14_reg4_dinov2", (FEATURES, POOLED)),
    Case(
        "Dinov2WithRegistersForImageClassification", vit(use_swiglu_ffn=True, **LABELS),
        "vit_giant_patch14_reg4_dinov2", (FEATURES,), "dinov2_with_registers",
    ),
    Case("CLIPVisionModel", vit(**CLIP), "vit_base_patch32_clip_quickgelu_224", (POOLED,)),
    Case(
        "CLIPVisionModelWithProjection", vit(**CLIP, projection_dim=6),
        "vit_base_patch32_clip_quickgelu_224", ("image_embeds",),
    ),
    Case(
        "CLIPModel", {"vision_config": vit(**CLIP), "projection_dim": 6, **WITH_TEXTS},
        "vit_base_patch32_clip_quickgelu_224", (POOLED,), "vision_model",
    ),
    Case("SiglipVisionModel", vit(), SIGLIP, (FEATURES, POOLED)),
    Case("SiglipVisionModel", vit(), SIGLIP_GAP, (FEATURES,)),
    Case("SiglipVisionModel", vit(hidden_act="gelu"), "vit_base_patch16_siglip_224", (POOLED,)),
    Case("SiglipModel", {"vision_config": vit(), **WITH_TEXTS}, SIGLIP, (POOLED,), "vision_model"),
    Case(
        "SiglipForImageClassification", {"vision_config": vit(), **WITH_TEXTS, **LABELS},
        SIGLIP_GAP, (LOGITS,),
    ),
    Case("ConvNextModel", convnext(), "convnext_tiny", (FEATURES, POOLED)),
    Case("ConvNextForImageClassification", convnext(**LABELS), "convnext_tiny", (LOGITS,)),
    Case("ConvNextForImageClassification", convnext(**LABELS), "convnext_atto", (LOGITS,)),
    Case("ConvNextV2Model", convnext(), "convnextv2_tiny", (FEATURES, POOLED)),
    Case("ConvNextV2ForImageClassification", convnext(**LABELS), "convnextv2_tiny", (LOGITS,)),
    Case("ConvNextV2ForImageClassification", convnext(**LABELS), "convnextv2_atto", (LOGITS,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_file_of_transformers(
    case: Case, transformers_oracle: Oracle, record_property: Any
) -> None:
    is_convnext = "ConvNext" in case.model
    folder = transformers_oracle.case(
        "make", name=case.model, config=case.config,
        size=2 * SIZE if is_convnext else SIZE, part=case.part, dtype=case.dtype,
    )  # fmt: skip
    if is_convnext:
        fields: dict[str, Any] = {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
        fields["input_size"] = (2 * SIZE, 2 * SIZE)
    else:
        fields = {"embed_dim": 96, "depth": 2, "num_heads": 3, "patch_size": 8}
        fields["input_size"] = (SIZE, SIZE)
    outputs = {LOGITS: 5, "image_embeds": 6}.get(case.answers[0], 0)
    model = tfimm_lora.create_model(
        case.arch, model_path=folder / "model.safetensors", nb_classes=outputs, **fields
    )
    x = load(folder, "input")
    errors = {}
    for name in case.answers:
        theirs = load(folder, name)
        if name == FEATURES and theirs.ndim == 4:
            theirs = theirs.transpose(0, 2, 3, 1)
        ours = model.forward_features(x) if name == FEATURES else model(x)
        errors[name] = relative_error(ours, theirs)
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TIMM_TOLERANCE, errors


def test_config_of_transformers_is_no_timm_folder(transformers_oracle: Oracle) -> None:
    """Its folder is not pretrained='folder': the message says what to do with the file."""
    folder = transformers_oracle.case("make", name="ViTModel", config=vit(), size=SIZE)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTModel"]
    with pytest.raises(ValueError, match="describes a ViTModel of the library transformers"):
        tfimm_lora.create_model("vit_tiny_patch16_224", pretrained=str(folder))


def test_a_classifier_on_more_than_the_pooled_features(transformers_oracle: Oracle) -> None:
    """Dinov2ForImageClassification looks at class token and patches, no model of timm's does."""
    folder = transformers_oracle.case(
        "make", name="Dinov2ForImageClassification", config=vit(**LABELS),
        size=SIZE, part="dinov2", dtype="float32",
    )  # fmt: skip
    fields = {"embed_dim": 96, "depth": 2, "num_heads": 3, "patch_size": 8, "input_size": (32, 32)}
    path = folder / "model.safetensors"
    with pytest.raises(ValueError, match=r"Weight 'head.weight' has shape \(192, 5\) in the sou"):
        tfimm_lora.create_model("vit_small_patch14_dinov2", False, path, nb_classes=5, **fields)
    model = tfimm_lora.create_model("vit_small_patch14_dinov2", False, path, nb_classes=3, **fields)
    assert model(load(folder, "input")).shape == (2, 3)
