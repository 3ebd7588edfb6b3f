"""Creating LoRA models and converting models to and fro."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import keras

import tfimm_lora.lora.convnext
import tfimm_lora.lora.vit  # noqa: F401  (registers the variants)
from tfimm_lora.architectures.config import base_config_values, make_config
from tfimm_lora.lora.config import split_lora_values
from tfimm_lora.lora.first_updates import initialize_adapters
from tfimm_lora.lora.functional import (
    convert_functional_model,
    is_functional,
)
from tfimm_lora.lora.keeps_adapters import FACTS, KeepsAdapters
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.registry import lora_architecture
from tfimm_lora.lora.trainable import fully_trained_layers, set_trainable
from tfimm_lora.models.factory import build_model, create_features, create_with_class
from tfimm_lora.models.factory import create_model as create_regular_model
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.models.registry import model_class
from tfimm_lora.models.sources import architecture_of
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.quantization.models import QuantizedModel, quantized_base_architecture
from tfimm_lora.weights.names import LORA_WEIGHT_NAMES
from tfimm_lora.weights.tfimm_files import is_tfimm_file


def create_model(
    model_name: str,
    pretrained: bool | str = False,
    model_path: str | os.PathLike[str] = "",
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Creates the LoRA variant of a model by its timm name.

    The adapted model is built once and weights are read straight into it.

    Args:
        model_name: See :func:`tfimm_lora.create_model`.
        pretrained: See :func:`tfimm_lora.create_model`.
        model_path: See :func:`tfimm_lora.create_model`; a file of the regular or of the LoRA
            model. With a LoRA model of tfimm's, give the ``lora_rank`` and the ``lora_alpha`` that
            it was trained with: the file does not say alpha, and tfimm's default is 1.
        features_only: See :func:`tfimm_lora.create_model`; the backbone is the LoRA model.
        out_indices: See :func:`tfimm_lora.create_model`.
        **kwargs: Fields of the LoRA variant's config: those of the model, and those that start
            with ``lora_``, see :class:`~tfimm_lora.lora.LoRAConfig`.

    Returns:
        A built LoRA model whose ``trainable`` flags are set.

    Raises:
        ValueError: A name or a field is unknown, a target matches nothing, or weights do not fit.
        OSError: Weights cannot be found or downloaded.

    Example:
        >>> model = create_model("convnext_tiny", lora_rank=2)
    """
    create = partial(_create_lora_model, model_name, pretrained, model_path)
    return create_features(create, model_name, model_path, features_only, out_indices, kwargs)


def _create_lora_model(
    model_name: str,
    pretrained: bool | str,
    model_path: str | os.PathLike[str],
    **kwargs: Any,
) -> keras.Model:
    lora_cls = lora_architecture(model_class(architecture_of(model_name)))
    path = Path(model_path)
    keras_weights = path.name.endswith(".weights.h5") and not is_tfimm_file(path)
    if keras_weights and not _holds_lora_weights(path):
        lora, rest = split_lora_values(kwargs)
        model = create_regular_model(model_name, pretrained, model_path, **rest)
        return convert_to_lora_model(model, **lora)
    return _settled(create_with_class(lora_cls, model_name, pretrained, model_path, **kwargs))


def _holds_lora_weights(path: Path) -> bool:
    """Whether a ``.weights.h5`` file was saved from a LoRA model."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}.")
    found = []

    def visit(name: str) -> None:
        if FACTS in name or any(part in name for part in LORA_WEIGHT_NAMES):
            found.append(name)

    with h5py.File(path) as file:
        file.visit(visit)
    return bool(found)


def convert_to_lora_model(model: keras.Model, **kwargs: Any) -> keras.Model:
    """Creates the LoRA version of a model, with its weights.

    Models of the zoo and of registered classes become their LoRA variant. Functional and
    Sequential models, ``keras.applications`` and KerasHub backbones among them, are cloned with
    LoRA layers inside; the result is a functional model. A feature extractor becomes one of a LoRA
    model.

    Args:
        model: A built model; it is not changed. A quantised one
            (:class:`~tfimm_lora.quantization.QuantizedModel`) keeps its codes.
        **kwargs: Fields that start with ``lora_``, see :class:`~tfimm_lora.lora.LoRAConfig`.

    Returns:
        A built LoRA model whose ``trainable`` flags are set.

    Raises:
        ValueError: The model has LoRA layers already, its class has no LoRA variant, a field is
            unknown, or a target matches nothing.

    Example:
        >>> lora_model = convert_to_lora_model(model, lora_rank=8)
    """
    if isinstance(model, FeatureExtractor):
        return model.replace_backbone(convert_to_lora_model(model.backbone, **kwargs))
    if isinstance(model, KeepsAdapters) or lora_layers(model):
        raise ValueError(
            "The model has LoRA layers already. Use lora.convert_to_regular_model(model) first, "
            "which merges them."
        )
    unknown = split_lora_values(kwargs)[1]
    if unknown:
        raise ValueError(
            f"convert_to_lora_model takes fields that start with 'lora_', found "
            f"{', '.join(map(repr, unknown))}. Pass these to create_model."
        )
    if is_functional(model):
        return _settled(convert_functional_model(model, kwargs))
    regular_cls = type(model)
    if isinstance(model, QuantizedModel):
        regular_cls = quantized_base_architecture(regular_cls)
        stored = {"lora_quantization": model.cfg.quantization}
        kwargs = {**stored, "lora_group_size": model.cfg.group_size, **kwargs}
    lora_cls: Any = lora_architecture(regular_cls)
    cfg = make_config(lora_cls.cfg_class, base_config_values(model.cfg, lora_cls.cfg_class), kwargs)
    facts = getattr(model, "pretrained_cfg", None)
    copy = partial(transfer_weights, model, weights_to_ignore=LORA_WEIGHT_NAMES)
    return _settled(build_model(lora_cls, cfg, facts, copy))


def _settled(model: Any) -> keras.Model:
    """Gives adapters first values that depend on the kernels, and sets flags."""
    initialize_adapters(model)
    if isinstance(model, KeepsAdapters):
        model._adapter_state.settle(model)
    else:
        bias = getattr(model.cfg, "lora_train_bias", "none")
        set_trainable(model, bias, fully_trained_layers(model))
    return model
