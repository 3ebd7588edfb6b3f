"""Creating a model by its name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras

from tfimm_lora.architectures.config import (
    base_config_values,
    classifier_paths,
    config_to_dict,
    make_config,
)
from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.models.features import (
    FeatureExtractor,
    require_features,
    without_classifier,
)
from tfimm_lora.models.registry import model_class
from tfimm_lora.models.sources import architecture_of, resolve_source
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.weights.first_values import building
from tfimm_lora.weights.licence import warn_of_license
from tfimm_lora.weights.loading import classes_of, load_file, load_safetensors, open_weights
from tfimm_lora.weights.names import LORA_WEIGHT_NAMES, is_lora_weight, named_variables
from tfimm_lora.weights.safetensors_file import refuse_pickle
from tfimm_lora.weights.tfimm_files import is_tfimm_file


def create_model(
    model_name: str,
    pretrained: bool | str = False,
    model_path: str | os.PathLike[str] = "",
    *,
    in_channels: int | None = None,
    nb_classes: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **config: Any,
) -> keras.Model:
    """Creates a model by its timm name, optionally with weights.

    Args:
        model_name: ``arch`` or ``arch.tag``, see :func:`~tfimm_lora.list_models`; or, as in timm,
            ``hf-hub:org/repo`` or ``local-dir:folder``, whose ``config.json`` names the model.
        pretrained: ``True`` for the default tag's weights; a tag; ``hf-hub:org/repo`` (with
            ``@revision`` if need be); or a folder with ``config.json`` and ``model.safetensors``.
            Defaults to ``False``.
        model_path: A weights file, preferred to ``pretrained``: ``.safetensors`` in timm's key
            names, ``.weights.h5`` or ``.keras``; or what tfimm has saved: ``.h5``, a TensorFlow
            checkpoint or the folder of a SavedModel. Defaults to none.
        in_channels: Number of input channels; ``None`` takes the model's. The first convolution of
            a checkpoint is adapted.
        nb_classes: Number of classes, 0 for pooled features. A number other than the
            checkpoint's gives a fresh classifier. ``None`` takes the checkpoint's; for a
            ``.safetensors`` file or one of tfimm, the model's, and the file has to have as many or
            no classifier.
        features_only: Return a :class:`~tfimm_lora.models.FeatureExtractor` without classifier,
            whose outputs are feature maps of several depths. Defaults to ``False``.
        out_indices: Which maps ``features_only`` returns: an integer n for the last n, or a list
            of numbers; ``None`` for all stages of a ConvNeXt, the last three blocks of a ViT.
        **config: Any other field of the model's config, for example ``input_size=(H, W)`` or
            ``drop_path_rate=0.1``. timm's ``num_classes``, ``in_chans``, ``img_size`` are accepted.

    Returns:
        A built model. Inputs are normalised NHWC images, outputs are logits (or feature maps).

    Raises:
        ValueError: A name, tag or config field is unknown, or weights do not fit.
        OSError: Weights cannot be found or downloaded.

    Example:
        >>> model = create_model("vit_tiny_patch16_224", nb_classes=10)
    """
    fields = {"in_channels": in_channels, "nb_classes": nb_classes, **config}
    create = partial(create_with_class, None, model_name, pretrained, model_path)
    return create_features(create, model_name, model_path, features_only, out_indices, fields)


def create_features(
    create: Callable[..., keras.Model],
    model_name: str,
    model_path: str | os.PathLike[str],
    features_only: bool,
    out_indices: int | Sequence[int] | None,
    fields: dict[str, Any],
) -> keras.Model:
    """Creates a model from its config fields, and an extractor around it if one is wanted.

    Args:
        create: Takes config fields and returns a model.
        model_name: See :func:`create_model`.
        model_path: See :func:`create_model`.
        features_only: See :func:`create_model`.
        out_indices: See :func:`create_model`.
        fields: Config fields that a user typed.
    """
    if not features_only:
        if out_indices is not None:
            raise ValueError(f"out_indices={out_indices!r} needs features_only=True.")
        return create(**fields)
    require_features(model_class(architecture_of(model_name)))
    model = create(**without_classifier(fields, model_path))
    return FeatureExtractor(model, out_indices, freeze_unused=True)


def create_with_class(
    model_cls: type | None,
    model_name: str,
    pretrained: bool | str = False,
    model_path: str | os.PathLike[str] = "",
    **overrides: Any,
) -> keras.Model:
    """:func:`create_model` for another class, whose config extends the model's own.

    Args:
        model_cls: The class to create; ``None`` takes the registered one.
        model_name: See :func:`create_model`.
        pretrained: See :func:`create_model`.
        model_path: See :func:`create_model`.
        **overrides: Config fields; ``in_channels`` and ``nb_classes`` may be ``None``.

    Returns:
        A built model with its weights.
    """
    source = resolve_source(model_name, False if model_path else pretrained)
    cls: Any = model_cls or source.entry.resolve_class()
    overrides = {k: v for k, v in overrides.items() if v is not None or k not in _OPTIONAL}
    cfg, facts = make_config(cls.cfg_class, config_to_dict(source.cfg), overrides), source.facts
    if model_path:
        chosen = any(k in overrides for k in ("nb_classes", "num_classes"))
        path = Path(model_path)
        if is_tfimm_file(path):
            return _load_file(cls, cfg, facts, path, fresh_classifier=chosen)
        if not path.exists():
            raise FileNotFoundError(f"There is no weights file {path}.")
        refuse_pickle(path)
        if path.suffix == ".keras":
            saved = keras.saving.load_model(path, compile=False)
            return _from_saved_model(cls, overrides, saved)
        if path.name.endswith(".weights.h5"):
            return _load_keras_weights(cls, cfg, facts, path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path.name}: weights files end in .safetensors, .weights.h5 or .keras; those of "
                "tfimm end in .h5, or are a TensorFlow checkpoint or the folder of a SavedModel."
            )
        return _load_file(cls, cfg, facts, path, fresh_classifier=chosen)
    if source.path is None:
        return build_model(cls, cfg, facts)
    load = partial(
        load_safetensors,
        path=source.path,
        source_size=source.cfg.input_size,
        # A file that has not the classes its facts promise is an error, not a fresh classifier.
        fresh_classifier=cfg.nb_classes != facts.num_classes,
    )
    model = build_model(cls, cfg, facts, load)
    warn_of_license(facts)
    return model


_OPTIONAL = ("in_channels", "nb_classes")


def build_model(
    cls: type,
    cfg: Any,
    facts: PretrainedConfig | None,
    load: Callable[[keras.Model], Any] | None = None,
) -> keras.Model:
    """Constructs and builds a model.

    Args:
        cls: The model class; takes ``cfg`` as first argument.
        cfg: Its config.
        facts: What is known about its checkpoint, kept as ``model.pretrained_cfg``.
        load: Gives the built model weights. Those that it sets by
            :func:`~tfimm_lora.weights.first_values.assign_all` are not drawn before; the others
            are fresh. Defaults to ``None``: all are.
    """
    model = cls(cfg)
    model.pretrained_cfg = facts
    builds_itself = hasattr(cfg, "input_size") and type(model).build is not keras.Model.build
    with building(model) if builds_itself else contextlib.nullcontext():
        if builds_itself:
            model.build((None, *cfg.input_size, cfg.in_channels))
        else:
            model(model.dummy_inputs)
        if load is not None:
            load(model)
    return model


def _load_keras_weights(cls: type, cfg: Any, facts: PretrainedConfig, path: Path) -> keras.Model:
    """Creates a model with the weights of a ``.weights.h5`` file."""
    model = build_model(cls, cfg, dataclasses.replace(facts, num_classes=cfg.nb_classes))
    try:
        model.load_weights(path)
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit: a .weights.h5 file needs a model of the config it was saved "
            f"from, and this one has nb_classes={cfg.nb_classes}, in_channels="
            f"{cfg.in_channels}, input_size={tuple(cfg.input_size)}. ({error})"
        ) from error
    return model


def _load_file(
    cls: type, cfg: Any, facts: PretrainedConfig, path: Path, fresh_classifier: bool
) -> keras.Model:
    """Creates a model with the weights of one file that is read by timm's names."""
    # The head's size is that of the file, whatever the default tag of the architecture has.
    with open_weights(path, cfg) as file:
        classes = classes_of(file.shapes, classifier_paths(cfg))
        facts = dataclasses.replace(facts, num_classes=classes, hf_hub_id="", file=str(path))
        if not classes and not fresh_classifier:
            cfg = dataclasses.replace(cfg, nb_classes=0)
        load = partial(
            load_file,
            file=file,
            source_size=facts.input_size[1:],
            fresh_classifier=fresh_classifier,
        )
        return build_model(cls, cfg, facts, load)


def _from_saved_model(cls: Any, overrides: dict[str, Any], saved: Any) -> keras.Model:
    """Takes a saved model as it is if its config is the wanted one, else copies its weights."""
    saved = saved.backbone if isinstance(saved, FeatureExtractor) else saved
    if not hasattr(saved, "cfg"):
        raise ValueError(f"The file holds a {type(saved).__name__}, not a model of this package.")
    values = base_config_values(saved.cfg, cls.cfg_class)
    cfg = make_config(cls.cfg_class, values, overrides)
    if type(saved) is cls and saved.cfg == cfg:
        return saved
    facts = getattr(saved, "pretrained_cfg", None)
    if facts is not None:
        facts = dataclasses.replace(facts, num_classes=saved.cfg.nb_classes)

    def copy(model: keras.Model) -> None:
        adapted, wanted = (
            any(is_lora_weight(v.leaf) for v in named_variables(m)) for m in (saved, model)
        )
        if adapted and not wanted:
            raise ValueError(
                "The file holds a LoRA model. Load it with keras.saving.load_model or "
                "lora.create_model, then use lora.convert_to_regular_model."
            )
        transfer_weights(saved, model, None if adapted else LORA_WEIGHT_NAMES)

    return build_model(cls, cfg, facts, copy)
