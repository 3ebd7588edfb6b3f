"""The line about trainable weights says what PEFT's line says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.oracles import Oracle
from tests.parity.adapters import PLAIN, with_adapter
from tests.parity.compare import load_meta
from tfimm_lora import lora


def trainable(line: str) -> int:
    """The number in ``trainable params: 667,493 || all params: ... || trainable%: ...``."""
    match = re.search(
        r"trainable params: ([\d,]+) \|\| all params: [\d,]+ \|\| trainable%: [\d.]+", line
    )
    assert match, line
    return int(match[1].replace(",", ""))


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "lora-vit-mica"])
def test_loaded_adapters(name: str, peft_oracle: Oracle, capsys: pytest.CaptureFixture) -> None:
    case = peft_oracle.case("generate", name=name)
    model = with_adapter(case)
    capsys.readouterr()
    lora.print_trainable_parameters(model)
    assert trainable(capsys.readouterr().out) == trainable(load_meta(case)["printed"])


COUNTED = [
    # (architecture, ours, PEFT's, number)
    (
        "vit_base_patch16_224",
        {"lora_rank": 16, "lora_targets": ["attn.q", "attn.v"]},
        {"r": 16, "target_modules": ["qkv"], "modules_to_save": ["head"]},
        667_493,
    ),
    (
        "vit_base_patch16_224",
        {"lora_rank": 16, "lora_targets": ["attn.qkv"]},
        {"r": 16, "target_modules": ["qkv"], "modules_to_save": ["head"]},
        667_493,
    ),
    (
        "convnext_tiny",
        {"lora_rank": 2},
        {"r": 2, "target_modules": ["fc1", "fc2"], "modules_to_save": ["head.fc"]},
        132_480 + 101 * 769,
    ),
]


@pytest.mark.parametrize(("arch", "ours", "theirs", "number"), COUNTED)
def test_full_size(
    arch: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    number: int,
    peft_oracle: Oracle,
    capsys: pytest.CaptureFixture,
) -> None:
    """101 classes, so the head is fresh and trained.

    PEFT cannot target q and v of a fused qkv; rank 16 on the whole has as many weights as rank 16
    on each of the two.
    """
    model = lora.create_model(arch, nb_classes=101, lora_train_classifier=True, **ours)
    capsys.readouterr()
    lora.print_trainable_parameters(model)
    assert trainable(capsys.readouterr().out) == number
    assert trainable(peft_oracle.call("count", arch=arch, nb_classes=101, **theirs)) == number
