"""Which modules a config means: our reading of PEFT's rules next to PEFT."""

from __future__ import annotations

from typing import Any

import pytest

import tfimm_lora
from tests.oracles import Oracle
from tfimm_lora.lora.peft.targets import module_kinds, pattern_value, targeted_modules

LORA, LN = "LoraConfig", "LNTuningConfig"
TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "suffix": ("vit", LORA, {"target_modules": ["qkv"]}),
    "suffixes": ("vit", LORA, {"target_modules": ["qkv", "fc1", "attn.proj"]}),
    "proj-is-the-patches-too": ("vit", LORA, {"target_modules": ["proj"]}),
    "no-part-of-a-word": ("vit", LORA, {"target_modules": ["kv", "fc1"]}),
    "exact": ("vit", LORA, {"target_modules": ["blocks.1.mlp.fc1", "head"]}),
    "some-match": ("vit", LORA, {"target_modules": ["qkv", "nothing"]}),
    "regex": ("vit", LORA, {"target_modules": r"blocks\.[135]\.(attn\.proj|mlp\.fc\d)"}),
    "regex-lookahead": ("vit", LORA, {"target_modules": r"(?!blocks\.0).*(qkv|fc2)$"}),
    "regex-is-anchored": ("vit", LORA, {"target_modules": "qkv"}),
    "all-linear": ("vit", LORA, {"target_modules": "all-linear"}),
    "all-linear-case": ("vit", LORA, {"target_modules": "All-Linear"}),
    "exclude": ("vit", LORA, {"target_modules": "all-linear", "exclude_modules": ["head", "fc1"]}),
    "exclude-exact": (
        "vit", LORA, {"target_modules": ["qkv"], "exclude_modules": ["blocks.0.attn.qkv"]},
    ),
    "exclude-regex": (
        "vit", LORA, {"target_modules": ["qkv", "fc2"], "exclude_modules": r".*\.[0-3]\..*"},
    ),
    "exclude-all": ("vit", LORA, {"target_modules": ["qkv"], "exclude_modules": ["qkv"]}),
    "shielded": ("vit", LORA, {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    "shielded-subtree": (
        "vit", LORA, {"target_modules": ["qkv", "fc1"], "modules_to_save": ["mlp"]},
    ),
    "all-shielded": ("vit", LORA, {"target_modules": ["head"], "modules_to_save": ["head"]}),
    "layers": (
        "vit", LORA,
        {"target_modules": ["qkv"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    ),
    "one-layer": (
        "vit", LORA,
        {"target_modules": ["qkv"], "layers_to_transform": 1, "layers_pattern": ["x", "blocks"]},
    ),
    "layers-without-pattern": (
        "vit", LORA, {"target_modules": ["qkv"], "layers_to_transform": [0]},
    ),
    "layers-and-exact": (
        "vit", LORA,
        {"target_modules": ["qkv", "blocks.3.mlp.fc1", "head"], "layers_to_transform": [0],
         "layers_pattern": "blocks"},
    ),
    "no-layers": ("vit", LORA, {"target_modules": ["qkv"], "layers_to_transform": []}),
    "layers-with-regex": ("vit", LORA, {"target_modules": ".*qkv", "layers_to_transform": [0]}),
    "pattern-without-layers": (
        "vit", LORA, {"target_modules": ["qkv"], "layers_pattern": "blocks"},
    ),
    "nothing": ("vit", LORA, {"target_modules": ["query", "value"]}),
    "norms-are-none": ("vit", LORA, {"target_modules": ["norm1"]}),
    "no-container": ("vit", LORA, {"target_modules": ["mlp"]}),
    "ranks": (
        "vit", LORA,
        {"r": 4, "target_modules": ["qkv", "fc1", "fc2"],
         "rank_pattern": {"blocks.0.attn.qkv": 2, r"blocks\.[12]\.mlp\.fc1": 6,
                          "locks.2.attn.qkv": 9, "^blocks.3.mlp.fc2": 7, "fc1": 3, "attn": 5}},
    ),
    "stages": (
        "convnext", LORA,
        {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "stages"},
    ),
    "blocks-of-stages": ("convnext", LORA, {"target_modules": ["fc1"], "layers_to_transform": [0]}),
    "convolutions": ("convnext", LORA, {"target_modules": ["stem.0", "downsample.1"]}),
    "numbers": ("convnext", LORA, {"target_modules": ["0"]}),
    "convnext-all-linear": ("convnext", LORA, {"target_modules": "all-linear"}),
    "convnext-head": (
        "convnext", LORA, {"target_modules": "all-linear", "modules_to_save": ["head"]},
    ),
    "guide": (
        "convnext", LORA, {"target_modules": r".*\.mlp\.fc\d", "modules_to_save": ["head.fc"]},
    ),
    "loha": ("convnext", "LoHaConfig", {"target_modules": ["conv_dw", "fc1"]}),
    "lokr-layers": (
        "vit", "LoKrConfig",
        {"target_modules": ["qkv"], "layers_to_transform": [5], "layers_pattern": "blocks"},
    ),
    "vera": ("vit", "VeraConfig", {"target_modules": ["qkv", "fc2"]}),
    "vera-convolution": ("convnext", "VeraConfig", {"target_modules": ["stem.0"]}),
    "ia3": ("vit", "IA3Config", {"target_modules": ["qkv", "fc2"], "feedforward_modules": ["fc2"]}),
    "oft": ("vit", "OFTConfig", {"target_modules": ["attn.proj"], "oft_block_size": 8, "r": 0}),
    "boft": ("vit", "BOFTConfig", {"target_modules": ["qkv"], "boft_block_size": 8}),
    "adalora": (
        "vit", "AdaLoraConfig",
        {"target_modules": ["qkv"], "total_step": 10, "exclude_modules": ["blocks.1.attn.qkv"]},
    ),
    "norms": ("vit", LN, {"target_modules": r"blocks\.\d+\.norm[12]|norm"}),
    "norms-by-name": ("vit", LN, {"target_modules": ["norm1"]}),
    "norms-of-convnext": ("convnext", LN, {"target_modules": ["head.norm", "stem.1"]}),
}  # fmt: skip

TYPES = {
    LORA: "LORA", LN: "LN_TUNING", "LoHaConfig": "LOHA", "LoKrConfig": "LOKR", "VeraConfig": "VERA",
    "IA3Config": "IA3", "OFTConfig": "OFT", "BOFTConfig": "BOFT", "AdaLoraConfig": "ADALORA",
}  # fmt: skip

RAISING = {
    "regex-is-anchored", "exclude-all", "all-shielded", "layers-without-pattern",
    "layers-with-regex", "pattern-without-layers", "nothing", "norms-are-none", "no-container",
    "vera-convolution", "numbers",
}  # fmt: skip


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, str]]:
    """Kinds of the modules of both models."""
    names = {"vit": "test_vit", "convnext": "test_convnext"}
    return {k: module_kinds(tfimm_lora.create_model(n, nb_classes=7)) for k, n in names.items()}


@pytest.mark.parametrize("name", TABLE)
def test_targets(name: str, peft_oracle: Oracle, kinds: dict[str, Any]) -> None:
    arch, kind, fields = TABLE[name]
    answer = peft_oracle.call(
        "targeted", arch=f"test_{arch}", kind=kind, fields=fields, num_classes=7
    )
    config = {"peft_type": TYPES[kind], **fields}
    assert ("error" in answer) == (name in RAISING), answer
    if "error" in answer:
        with pytest.raises(ValueError, match=r"match|cannot go with|needs layers_to_transform"):
            targeted_modules(config, kinds[arch])
        return
    assert sorted(targeted_modules(config, kinds[arch])) == answer["modules"]
    for module, rank in answer["ranks"].items():
        if "rank_pattern" in fields:
            assert pattern_value(fields["rank_pattern"], module, fields["r"]) == rank, module
    # What PEFT writes down may be another list, with the same meaning.
    again = {**answer["config"], "peft_type": TYPES[kind]}
    assert sorted(targeted_modules(again, kinds[arch])) == answer["modules"]
