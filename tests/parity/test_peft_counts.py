"""The line about trainable weights says what PEFT's line says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.oracles import Oracle
from tests.parity.adapters import with_adapter
from tests.parity.compare import load_meta
from tests.parity.peft_cases import LORA, OTHERS, RANDOM_START
from tfimm_lora import lora


def trainable(line: str) -> int:
    """The number in ``trainable params: 667,493 || all params: ... || trainable%: ...``."""
    match = re.search(
        r"trainable params: ([\d,]+) \|\| all params: [\d,]+ \|\| trainable%: [\d.]+", line
    )
    assert match, line
    return int(match[1].replace(",", ""))


# An adapter that is loaded trains all of its factors, PEFT's MiCA freezes B; there the pruned ranks
# of AdaLoRA count until the adapter is saved.
OTHERWISE = {"lora-vit-mica", "adalora-vit-pruned", RANDOM_START}


@pytest.mark.filterwarnings("ignore:.*the adapter has .* weights where the kernel")
@pytest.mark.parametrize("name", [n for n in [*LORA, *OTHERS] if n not in OTHERWISE])
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


GUIDE = {
    "lora": (667_493, 16, {}),
    "loha": (1_257_317, 16, {}),
    "lokr": (116_069, 16, {}),
    "adalora": (520_325, 12, {"target_rank": 8, "total_step": 100}),
}
"""The numbers of PEFT's guide to image classification: ViT-B/16, 101 classes, query and value."""


@pytest.mark.parametrize("method", GUIDE)
def test_the_numbers_of_the_guide(method: str, capsys: pytest.CaptureFixture) -> None:
    number, rank, options = GUIDE[method]
    model = lora.create_model(
        "vit_base_patch16_224", nb_classes=101, lora_method=method, lora_rank=rank,
        lora_targets=["attn.q", "attn.v"], lora_train_classifier=True, lora_options=options,
    )  # fmt: skip
    capsys.readouterr()
    lora.print_trainable_parameters(model)
    assert trainable(capsys.readouterr().out) == number


def test_peft_counts_the_same_on_a_fused_projection(peft_oracle: Oracle) -> None:
    """Where an adapter of the whole projection has as many weights as one of two slices."""
    for kind, fields, number in (
        ("LoraConfig", {"r": 16}, 667_493),
        ("LoHaConfig", {"r": 16}, 1_257_317),
        ("LoKrConfig", {"r": 16}, 106_853),
        ("AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": 100}, 520_181),
    ):
        line = peft_oracle.call(
            "count_kind", arch="vit_base_patch16_224", nb_classes=101, kind=kind,
            target_modules=["qkv"], modules_to_save=["head"], **fields,
        )  # fmt: skip
        assert trainable(line) == number, kind


@pytest.mark.parametrize(("method", "number"), [("lokr", 106_853), ("adalora", 520_181)])
def test_ours_on_a_fused_projection(
    method: str, number: int, capsys: pytest.CaptureFixture
) -> None:
    _, rank, options = GUIDE[method]
    model = lora.create_model(
        "vit_base_patch16_224", nb_classes=101, lora_method=method, lora_rank=rank,
        lora_targets=["attn.qkv"], lora_train_classifier=True, lora_options=options,
    )  # fmt: skip
    capsys.readouterr()
    lora.print_trainable_parameters(model)
    assert trainable(capsys.readouterr().out) == number
