"""Files written by tfimm 0.2.14 in its own process, read here: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfimm_lora
from tests.oracles import Oracle
from tests.parity.compare import relative_error
from tfimm_lora import lora
from tfimm_lora.models import transfer_weights

TOLERANCE = 1e-5

CONVNEXT = {"input_size": [64, 32], "nb_classes": 7}
# The same model in tfimm's words and in ours.
CONVNEXT_THEIRS = {**CONVNEXT, "embed_dim": [8, 16, 24, 32], "nb_blocks": [1, 2, 2, 1]}
CONVNEXT_OURS = {**CONVNEXT, "dims": (8, 16, 24, 32), "depths": (1, 2, 2, 1)}
VIT = {"input_size": [48, 32], "nb_classes": 7, "embed_dim": 32, "patch_size": 16}
VIT_THEIRS = {**VIT, "nb_blocks": 2, "nb_heads": 2}
VIT_OURS = {**VIT, "depth": 2, "num_heads": 2}
DISTILLED = {"distilled": True, "classifier": ["head", "head_dist"]}
RANK = {"lora_rank": 3, "lora_alpha": 8.0}

FILES = ["weights.h5", "weights.ckpt", "weights.ckpt.index"]
TRAINED_FILES = [*FILES, "saved", "trainer"]


def saved(
    oracle: Oracle, model: str, config: dict[str, Any], fit: bool = False, after: str = ""
) -> Path:
    """The folder of a model that tfimm has saved."""
    return oracle.case("save", model=model, config=config, fit=fit, after=after)


def error(model: Any, folder: Path) -> float:
    """How far a model's logits are from tfimm's."""
    logits = np.load(folder / "logits.npy")
    if logits.ndim == 3:  # of a distilled model tfimm returns both heads
        logits = logits.mean(axis=1)
    return relative_error(model(np.load(folder / "images.npy")), logits)


# --- Regular models ---------------------------------------------------------------------------

REGULAR = {
    "convnext": ("convnext_tiny", "ConvNeXt", CONVNEXT_THEIRS, CONVNEXT_OURS),
    "convnext-conv_mlp": (
        "convnext_tiny",
        "ConvNeXt",
        {**CONVNEXT_THEIRS, "conv_mlp_block": True},
        {**CONVNEXT_OURS, "conv_mlp": True},
    ),
    "convnext-5-channels": (
        "convnext_tiny",
        "ConvNeXt",
        {**CONVNEXT_THEIRS, "in_channels": 5},
        {**CONVNEXT_OURS, "in_channels": 5},
    ),
    "convnext-headless": (
        "convnext_tiny",
        "ConvNeXt",
        {**CONVNEXT_THEIRS, "nb_classes": 0},
        {**CONVNEXT_OURS, "nb_classes": 0},
    ),
    "vit": ("vit_tiny_patch16_224", "ViT", VIT_THEIRS, VIT_OURS),
    "vit-no-bias": (
        "vit_tiny_patch16_224",
        "ViT",
        {**VIT_THEIRS, "qkv_bias": False},
        {**VIT_OURS, "qkv_bias": False},
    ),
    "vit-headless": (
        "vit_tiny_patch16_224",
        "ViT",
        {**VIT_THEIRS, "nb_classes": 0},
        {**VIT_OURS, "nb_classes": 0},
    ),
    "deit": (
        "deit_tiny_distilled_patch16_224",
        "ViT",
        {**VIT_THEIRS, **DISTILLED},
        VIT_OURS,
    ),
}


@pytest.mark.parametrize("case", REGULAR)
def test_regular_models(case: str, tfimm_oracle: Oracle, record_property: Any) -> None:
    name, model_class, theirs, ours = REGULAR[case]
    folder = saved(tfimm_oracle, model_class, theirs)
    errors = {
        file: error(tfimm_lora.create_model(name, model_path=folder / file, **ours), folder)
        for file in FILES
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("case", ["convnext", "deit"])
def test_a_trained_model_with_its_optimizer_and_metrics(case: str, tfimm_oracle: Oracle) -> None:
    name, model_class, theirs, ours = REGULAR[case]
    folder = saved(tfimm_oracle, model_class, theirs, fit=True)
    for file in TRAINED_FILES:
        model = tfimm_lora.create_model(name, model_path=folder / file, **ours)
        assert error(model, folder) <= TOLERANCE, file


@pytest.mark.parametrize("file", ["new.weights.h5", "new.keras"])
@pytest.mark.parametrize("case", ["convnext", "vit"])
def test_files_without_names_say_how_to_convert_them(
    case: str, file: str, tfimm_oracle: Oracle
) -> None:
    name, model_class, theirs, ours = REGULAR[case]
    folder = saved(tfimm_oracle, model_class, theirs)
    for create in (tfimm_lora.create_model, lora.create_model):
        with pytest.raises(ValueError, match=r"no names of weights.*model.save_weights\('model.h5"):
            create(name, model_path=folder / file, **ours)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("case", ["convnext", "vit"])
def test_a_regular_file_is_the_base_of_a_lora_model(
    case: str, file: str, tfimm_oracle: Oracle
) -> None:
    name, model_class, theirs, ours = REGULAR[case]
    folder = saved(tfimm_oracle, model_class, theirs)
    model = lora.create_model(name, model_path=folder / file, lora_rank=2, **ours)
    assert error(model, folder) <= TOLERANCE
    factors = [v for v in model.trainable_variables if "_lora_" in v.path]
    assert len(factors) == len(model.trainable_variables) > 0  # the head is the file's
    fresh = lora.create_model(
        name, model_path=folder / file, lora_rank=2, **{**ours, "nb_classes": 3}
    )
    assert {v.path.rpartition("/")[2] for v in fresh.trainable_variables} >= {"kernel", "bias"}


# --- LoRA models ------------------------------------------------------------------------------


def lora_file(oracle: Oracle, after: str = "") -> Path:
    return saved(oracle, "LoRAConvNeXt", {**CONVNEXT_THEIRS, **RANK}, fit=True, after=after)


@pytest.mark.parametrize("file", TRAINED_FILES)
def test_lora_models(file: str, tfimm_oracle: Oracle) -> None:
    folder = lora_file(tfimm_oracle)
    model = lora.create_model(
        "convnext_tiny", model_path=str(folder / file), **RANK, **CONVNEXT_OURS
    )
    assert error(model, folder) <= TOLERANCE
    assert error(lora.convert_to_regular_model(model), folder) <= TOLERANCE
    # The update says something, and alpha counts: with that of a mere default it is another model.
    other = {**RANK, "lora_alpha": 3.0}
    model = lora.create_model("convnext_tiny", model_path=folder / file, **other, **CONVNEXT_OURS)
    assert error(model, folder) > 0.01


def test_tfimms_defaults(tfimm_oracle: Oracle) -> None:
    """Rank 4 is the default of both, alpha is 1 there."""
    folder = saved(tfimm_oracle, "LoRAConvNeXt", CONVNEXT_THEIRS)
    path = folder / "weights.h5"
    model = lora.create_model("convnext_tiny", model_path=path, lora_alpha=1.0, **CONVNEXT_OURS)
    assert error(model, folder) <= TOLERANCE


def test_a_converted_lora_model(tfimm_oracle: Oracle) -> None:
    folder = lora_file(tfimm_oracle, after="regular")
    for file in TRAINED_FILES:
        model = tfimm_lora.create_model("convnext_tiny", model_path=folder / file, **CONVNEXT_OURS)
        assert error(model, folder) <= TOLERANCE, file


def test_a_merged_lora_model_is_rescued_by_dropping_its_factors(tfimm_oracle: Oracle) -> None:
    """Its kernels have the update, which the factors would add again, here as in tfimm."""
    folder = lora_file(tfimm_oracle, after="merge")
    for file in TRAINED_FILES:
        model = lora.create_model(
            "convnext_tiny", model_path=folder / file, **RANK, **CONVNEXT_OURS
        )
        assert error(model, folder) > 0.01
        regular = tfimm_lora.create_model("convnext_tiny", **CONVNEXT_OURS)
        transfer_weights(model, regular, weights_to_ignore=lora.LORA_WEIGHT_NAMES)
        assert error(regular, folder) <= TOLERANCE, file


def test_lora_files_say_what_to_type(tfimm_oracle: Oracle) -> None:
    path = lora_file(tfimm_oracle) / "weights.h5"
    with pytest.raises(ValueError, match=r"LoRA model of rank 3. .*lora_rank=3, lora_alpha=1.0"):
        tfimm_lora.create_model("convnext_tiny", model_path=path, **CONVNEXT_OURS)
    with pytest.raises(ValueError, match=r"of rank 3, and the model's is 4. Pass lora_rank=3"):
        lora.create_model("convnext_tiny", model_path=path, lora_alpha=8.0, **CONVNEXT_OURS)
    with pytest.raises(ValueError, match=r"does not say its alpha.* lora_alpha=1.0 if none was"):
        lora.create_model("convnext_tiny", model_path=path, lora_rank=3, **CONVNEXT_OURS)
    with pytest.raises(ValueError, match=r"Not in the model: .*mlp.fc2.kernel_lora_a"):
        lora.create_model(
            "convnext_tiny", model_path=path, lora_targets="mlp.fc1", **RANK, **CONVNEXT_OURS
        )


# --- Models that differ from the file ---------------------------------------------------------


@pytest.mark.parametrize("case", ["convnext", "vit", "deit"])
def test_what_may_differ_is_fitted_as_for_safetensors(
    case: str, tfimm_oracle: Oracle, tmp_path: Path
) -> None:
    name, model_class, theirs, ours = REGULAR[case]
    theirs, ours = ({**config, "input_size": [64, 64]} for config in (theirs, ours))
    folder = saved(tfimm_oracle, model_class, theirs)
    path = folder / "weights.h5"
    same = tfimm_lora.create_model(name, model_path=path, **ours)
    tfimm_lora.models.save_safetensors(same, tmp_path / "same.safetensors")
    other = {**ours, "input_size": (96, 32), "in_channels": 4}
    models = [
        tfimm_lora.create_model(name, model_path=file, **other)
        for file in (path, tmp_path / "same.safetensors")
    ]
    images = np.random.default_rng(0).standard_normal((2, 96, 32, 4)).astype("float32")
    np.testing.assert_array_equal(models[0](images), models[1](images))
    assert models[0].pretrained_cfg.num_classes == 7

    # The model's own number of classes is 1000, and nobody asked for a fresh head.
    unasked = {k: v for k, v in ours.items() if k != "nb_classes"}
    with pytest.raises(ValueError, match=r"classifier of 7 classes and the model one of 1000"):
        tfimm_lora.create_model(name, model_path=path, **unasked)
    fresh = tfimm_lora.create_model(name, model_path=path, **{**ours, "nb_classes": 3})
    theirs_features = tfimm_lora.create_model(name, model_path=path, **{**ours, "nb_classes": 0})
    features = theirs_features(fresh.dummy_inputs)
    _, found = fresh(fresh.dummy_inputs, return_features=True)
    np.testing.assert_array_equal(found["features"], features)
    assert fresh(fresh.dummy_inputs).shape == (1, 3)


def test_a_headless_file_gives_a_headless_model(tfimm_oracle: Oracle) -> None:
    name, model_class, theirs, ours = REGULAR["vit-headless"]
    folder = saved(tfimm_oracle, model_class, theirs)
    unasked = {k: v for k, v in ours.items() if k != "nb_classes"}
    model = tfimm_lora.create_model(name, model_path=folder / "weights.h5", **unasked)
    assert model.cfg.nb_classes == 0
    assert error(model, folder) <= TOLERANCE


def test_a_representation_layer_goes_with_the_classifier_only(tfimm_oracle: Oracle) -> None:
    """As ``vit_huge_patch14_224_in21k`` has one in tfimm; timm has given it up."""
    folder = saved(tfimm_oracle, "ViT", {**VIT_THEIRS, "representation_size": 24})
    name, path = "vit_tiny_patch16_224", folder / "weights.h5"
    for classes in (7, 0):
        with pytest.raises(ValueError, match=r"pre_logits is a representation layer, which timm"):
            tfimm_lora.create_model(name, model_path=path, **{**VIT_OURS, "nb_classes": classes})
    model = tfimm_lora.create_model(name, model_path=path, **{**VIT_OURS, "nb_classes": 3})
    assert model(model.dummy_inputs).shape == (1, 3)


def test_the_wrong_model_is_explained(tfimm_oracle: Oracle) -> None:
    _, model_class, theirs, _ = REGULAR["vit"]
    folder = saved(tfimm_oracle, model_class, theirs)
    with pytest.raises(ValueError, match=r"read as weights that tfimm has saved, do not fit"):
        tfimm_lora.create_model("convnext_tiny", model_path=folder / "weights.h5", nb_classes=7)
    with pytest.raises(ValueError, match=r"Missing in the source: blocks.2.attn"):
        tfimm_lora.create_model(
            "vit_tiny_patch16_224", model_path=folder / "weights.ckpt", **{**VIT_OURS, "depth": 3}
        )
