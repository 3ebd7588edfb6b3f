"""Every architecture of the zoo can be adapted: default targets, one training step, merge.

Each run takes one model of every kind of block and head, the others are the slow sweep
(``pytest tests/test_lora_zoo.py --sample-slow 1``). There are two blocks of two heads of the real
width, or five blocks in four narrow stages.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    adapted_modules,
    assert_same_bits,
    images,
    numpy,
    randomize,
    relative_error,
    trained,
    values,
)
from tfimm_lora import lora
from tfimm_lora.architectures import ViTConfig
from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import iterate_layers, named_variables, timm_path

EVERY_RUN = (
    "aimv2_large_patch14_224",  # SwiGLU with two input layers
    "beit3_base_patch16_224",
    "convnext_atto",  # MLPs of 1x1 convolutions
    "convnext_tiny",
    "convnextv2_atto",
    "convnext_zepto_rms_ols",
    "deit_tiny_distilled_patch16_224",  # two classifiers
    "test_convnext3",
    "test_vit",
    "test_vit3",  # attention pooling
    "test_vit4",
    "vit_base_patch16_rpn_224",  # norms behind attention and MLP
    "vit_base_patch16_xp_224",  # parallel blocks, norms of queries and keys
    "vit_dpwee_patch16_reg1_gap_256",  # differential attention in parallel blocks
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_pwee_patch16_reg1_gap_256",  # parallel blocks
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_18x2_224",  # two attentions, two MLPs
)
NAMES = [
    name
    for module in ("convnext", "vision_transformer", "deit")
    for name in tfimm_lora.list_models(module=module)
]


def every_architecture() -> list[Any]:
    return [pytest.param(n, marks=() if n in EVERY_RUN else pytest.mark.slow, id=n) for n in NAMES]


def reduced_model(name: str) -> keras.Model:
    """Few narrow blocks, small images, seven classes, random weights."""
    cfg = tfimm_lora.models.model_config(name)
    if isinstance(cfg, ViTConfig):
        fields: dict[str, Any] = {
            "input_size": (2 * cfg.patch_size,) * 2,
            "depth": 2,
            "num_heads": 2,
            "embed_dim": 2 * cfg.embed_dim // cfg.num_heads,
        }
    else:
        fields = {"input_size": (64, 64), "depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
    return randomize(tfimm_lora.create_model(name, nb_classes=7, **fields))


def linear_layers_of_blocks(model: keras.Model) -> set[str]:
    """Paths of everything that multiplies by a matrix inside of the blocks."""
    kinds = (keras.layers.Dense, keras.layers.Conv2D)
    found = {timm_path(path) for path, layer in iterate_layers(model) if isinstance(layer, kinds)}
    return {path for path in found if "blocks." in path}


@pytest.mark.parametrize("name", every_architecture())
def test_convert_train_a_step_and_merge(name: str) -> None:
    base = reduced_model(name)
    x = images(base, batch=2)
    expected = numpy(base(x))
    model = lora.convert_to_lora_model(base, lora_rank=2)
    adapted = set(adapted_modules(model))
    assert adapted == linear_layers_of_blocks(base)
    np.testing.assert_array_equal(numpy(model(x)), expected)

    before = values(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    model.train_on_batch(x, np.array([1, 4]))
    after = values(model)
    moved = {n for n in after if not np.array_equal(after[n], before[n])}
    # Seven classes make a fresh classifier. B is zero at first, so that the first step leaves A.
    heads = {n for n in after if is_below(timm_path(n), classifier_paths(model.cfg))}
    assert moved == {n for n in after if n.endswith("kernel_lora_b")} | heads
    assert {v.path for v in named_variables(model) if v.variable.trainable} == {
        n for n in after if "kernel_lora_" in n
    } | heads

    # Where a step has gone is chance; the factors are set to something that matters.
    randomize(model, seed=1, only="kernel_lora_")
    adapted_logits = numpy(model(x))
    assert relative_error(adapted_logits, expected) > 1e-3
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is type(base) and regular.cfg == base.cfg
    assert relative_error(regular(x), adapted_logits) <= 5e-5
    merged = {f"{path}/kernel" for path, _ in iterate_layers(base) if timm_path(path) in adapted}
    ours, theirs = (
        {n: v for n, v in values(m).items() if n not in merged | heads} for m in (regular, base)
    )
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("test_vit3", ("head",)),  # attention pooling is part of the frozen model
        ("test_convnext", ("head.fc",)),
    ],
)
def test_a_fresh_classifier_is_trained(name: str, heads: tuple[str, ...]) -> None:
    """As many classes as the checkpoint has: frozen; another number: fresh, and trained."""
    for classes, expected in ((None, set()), (5, set(heads))):
        model = lora.create_model(name, nb_classes=classes, lora_rank=2)
        names = trained(model)
        found = {h for h in heads if any(is_below(n, h) for n in names)}
        assert found == expected
        assert all("lora" in n or is_below(n, heads) for n in names)


@pytest.mark.parametrize("name", ["test_vit3", "vit_pwee_patch16_reg1_gap_256"])
def test_layers_that_belong_to_no_group_can_be_named(name: str) -> None:
    targets = {"test_vit3": ["attn_pool.*"], "vit_pwee_patch16_reg1_gap_256": ["in_proj"]}[name]
    depth = {"depth": 1}
    model = lora.create_model(name, lora_rank=1, lora_targets=targets, **depth)
    adapted = [timm_path(p) for p, la in iterate_layers(model) if getattr(la, "adapters", None)]
    assert (
        adapted
        == {
            "test_vit3": [f"attn_pool.{p}" for p in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")],
            "vit_pwee_patch16_reg1_gap_256": ["blocks.0.in_proj"],
        }[name]
    )
    if name != "test_vit3":
        with pytest.raises(ValueError, match=r"this architecture has no such group\. Groups: all"):
            lora.create_model(name, lora_rank=1, lora_targets="attention", **depth)
