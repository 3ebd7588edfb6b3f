"""tfimm 0.2.14, the predecessor, with the same weights, LoRA weights included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import (
    move_trainable,
    random_weights,
    relative_error,
    set_timm_weights,
    timm_key,
    timm_weights,
)
from tfimm_lora import lora

TOLERANCE = 1e-5


def images(model: keras.Model) -> np.ndarray:
    shape = (2, *model.cfg.input_size, model.cfg.in_channels)
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def ask_tfimm(
    oracle: Oracle, folder: Path, model: keras.Model, tfimm_class: str, config: dict[str, Any]
) -> dict[str, np.ndarray]:
    """What tfimm's class answers with this model's weights."""
    weights = timm_weights(model)
    for variable in model.variables:
        if "_lora_" in variable.path:
            weights[timm_key(variable.path)] = keras.ops.convert_to_numpy(
                keras.ops.convert_to_tensor(variable)
            )
    np.savez(folder / "weights.npz", **weights)
    np.save(folder / "images.npy", images(model))
    count = oracle.call(
        "run",
        out=str(folder / "answer.npz"),
        model=tfimm_class,
        config={
            "input_size": model.cfg.input_size,
            "in_channels": model.cfg.in_channels,
            "nb_classes": model.cfg.nb_classes,
            **config,
        },
        weights=str(folder / "weights.npz"),
        inputs=str(folder / "images.npy"),
    )
    assert count["weights"] == count["given"], "the models have different numbers of weights"
    with np.load(folder / "answer.npz") as archive:
        return dict(archive)


SMALL = ((1, 1, 2, 1), (16, 24, 32, 40))
TINY = ((3, 3, 9, 3), (96, 192, 384, 768))


@pytest.mark.parametrize(
    ("depths", "dims", "rank", "alpha"),
    [(*SMALL, 3, 1.0), (*SMALL, 4, 8.0), (*TINY, 4, 8.0)],
    ids=["small-r3", "small-r4", "tiny-r4"],
)
def test_lora_convnext(
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    rank: int,
    alpha: float,
    tfimm_oracle: Oracle,
    tmp_path: Path,
    record_property: Any,
) -> None:
    """tfimm's own ``LoRAConvNeXt``: unmerged, merged, and converted to a regular model."""
    name = "convnext_tiny"
    model = lora.create_model(
        name,
        depths=depths,
        dims=dims,
        nb_classes=10,
        input_size=(64, 64),
        lora_rank=rank,
        lora_alpha=alpha,
        lora_train_classifier=True,
    )
    set_timm_weights(model, random_weights(model))
    move_trainable(model)
    theirs = ask_tfimm(
        tfimm_oracle,
        tmp_path,
        model,
        "LoRAConvNeXt",
        {"embed_dim": dims, "nb_blocks": depths, "lora_rank": rank, "lora_alpha": alpha},
    )
    base = timm_weights(model)
    errors = {"adapter": relative_error(model(images(model)), theirs["logits"])}
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == theirs["trainable"]
    regular = lora.convert_to_regular_model(model)
    errors["regular"] = relative_error(regular(images(model)), theirs["regular_logits"])
    lora.merge_lora_weights(model)
    errors["merged"] = relative_error(model(images(model)), theirs["merged_logits"])
    # The adapter says something, and merging moved the kernels.
    without = tfimm_lora.create_model(
        name, depths=depths, dims=dims, nb_classes=10, input_size=(64, 64)
    )
    set_timm_weights(without, base)
    assert relative_error(without(images(model)), theirs["logits"]) > 0.01
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_regular_convnext(
    conv_mlp: bool, tfimm_oracle: Oracle, tmp_path: Path, record_property: Any
) -> None:
    depths, dims = (1, 2, 2, 1), (16, 24, 32, 40)
    model = tfimm_lora.create_model(
        "convnext_tiny",
        depths=depths,
        dims=dims,
        conv_mlp=conv_mlp,
        nb_classes=10,
        in_channels=4,
        input_size=(64, 96),
    )
    set_timm_weights(model, random_weights(model))
    theirs = ask_tfimm(
        tfimm_oracle,
        tmp_path,
        model,
        "ConvNeXt",
        {"embed_dim": dims, "nb_blocks": depths, "conv_mlp_block": conv_mlp},
    )
    error = relative_error(model(images(model)), theirs["logits"])
    record_property("relative_errors", {"logits": error})
    assert error <= TOLERANCE


@pytest.mark.parametrize("nb_classes", [10, 0])
def test_vit(nb_classes: int, tfimm_oracle: Oracle, tmp_path: Path, record_property: Any) -> None:
    model = tfimm_lora.create_model(
        "vit_tiny_patch16_224", depth=4, nb_classes=nb_classes, input_size=(48, 64)
    )
    set_timm_weights(model, random_weights(model))
    theirs = ask_tfimm(
        tfimm_oracle,
        tmp_path,
        model,
        "ViT",
        {"embed_dim": 192, "nb_blocks": 4, "nb_heads": 3, "patch_size": 16},
    )
    error = relative_error(model(images(model)), theirs["logits"])
    record_property("relative_errors", {"logits": error})
    assert error <= TOLERANCE
