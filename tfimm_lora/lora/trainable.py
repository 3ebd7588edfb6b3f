"""Which weights are trained.

The truth is the ``trainable`` flag of every variable; the functions here compute and set it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.lora.config import TRAIN_BIAS
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import (
    NamedVariable,
    is_lora_weight,
    iterate_layers,
    named_variables,
    timm_path,
)

_BIASES = ("bias", "beta")


def _is_trained(v: NamedVariable, train_bias: str, modules: list[str]) -> bool:
    if is_lora_weight(v.leaf) or any(is_below(v.name, m) for m in modules):
        return True
    if v.leaf not in _BIASES or train_bias == "none":
        return False
    return train_bias == "all" or isinstance(v.layer, LoRALayer)


def _split(
    model: keras.layers.Layer, train_bias: str, trainable_layers: Iterable[str] | None
) -> tuple[list[Any], list[Any]]:
    if train_bias not in TRAIN_BIAS:
        raise ValueError(f"Unknown train_bias {train_bias!r}. Use one of {', '.join(TRAIN_BIAS)}.")
    modules = [m.replace("/", ".") for m in trainable_layers or ()]
    variables = named_variables(model)
    for module in modules:
        if not any(is_below(v.name, module) for v in variables):
            raise ValueError(f"trainable_layers: the model has no weights below {module!r}.")
    trained: list[Any] = []
    frozen: list[Any] = []
    for v in variables:
        # Moving statistics and the like are not for an optimizer, wherever they are.
        statistics = any(w is v.variable for w in v.layer._non_trainable_variables)
        wanted = _is_trained(v, train_bias, modules) and not statistics
        (trained if wanted else frozen).append(v.variable)
    return trained, frozen


def lora_trainable_weights(
    model: keras.layers.Layer,
    train_bias: str = "none",
    trainable_layers: Iterable[str] | None = None,
) -> list[Any]:
    """Lists the weights that LoRA training changes.

    Works for any model that has LoRA layers: subclassed, functional or Sequential.

    Args:
        model: A built model.
        train_bias: ``none``; ``lora_only`` adds the biases of LoRA layers; ``all`` adds all
            biases. Defaults to ``none``.
        trainable_layers: timm paths of layers that are trained in full.

    Returns:
        Variables, each once, in the model's order.

    Raises:
        ValueError: ``train_bias`` is unknown, or a layer has no weights.

    Example:
        >>> weights = lora_trainable_weights(model, trainable_layers=["head.fc"])
    """
    return _split(model, train_bias, trainable_layers)[0]


def lora_non_trainable_weights(
    model: keras.layers.Layer,
    train_bias: str = "none",
    trainable_layers: Iterable[str] | None = None,
) -> list[Any]:
    """Lists all weights that :func:`lora_trainable_weights` does not list.

    Args:
        model: A built model.
        train_bias: See :func:`lora_trainable_weights`.
        trainable_layers: See :func:`lora_trainable_weights`.

    Returns:
        Variables, each once, in the model's order.

    Raises:
        ValueError: ``train_bias`` is unknown, or a layer has no weights.

    Example:
        >>> frozen = lora_non_trainable_weights(model)
    """
    return _split(model, train_bias, trainable_layers)[1]


def fully_trained_layers(model: Any) -> list[str]:
    """Lists the layers that a LoRA model's config trains in full.

    With ``lora_train_classifier=None`` the classifier is trained if it is fresh, that is if its
    number of classes is not that of the checkpoint.

    Args:
        model: A model with a LoRA config.

    Returns:
        timm paths: the classifier if it is trained, and ``lora_modules_to_save``.
    """
    cfg: Any = model.cfg
    wanted = getattr(cfg, "lora_train_classifier", None)
    if wanted is None:
        facts = getattr(model, "pretrained_cfg", None)
        wanted = facts is not None and getattr(cfg, "nb_classes", 0) != facts.num_classes
    modules = list(getattr(cfg, "lora_modules_to_save", ()))
    if not wanted:
        return modules
    layers = {timm_path(path): layer for path, layer in iterate_layers(model)}
    # A headless model has no classifier, and an adapted one is not trained in full.
    classifiers = [
        p for p in classifier_paths(cfg) if p in layers and not isinstance(layers[p], LoRALayer)
    ]
    return [*(p for p in classifiers if p not in modules), *modules]


def set_trainable(
    model: keras.layers.Layer,
    train_bias: str = "none",
    trainable_layers: Iterable[str] | None = None,
) -> None:
    """Sets the ``trainable`` flag of every weight as :func:`lora_trainable_weights` says.

    Models of this package do so when they are built, from their config. Call it after changing
    flags by hand, and compile the model again.

    Args:
        model: A built model.
        train_bias: See :func:`lora_trainable_weights`.
        trainable_layers: See :func:`lora_trainable_weights`.

    Raises:
        ValueError: ``train_bias`` is unknown, or a layer has no weights.

    Example:
        >>> set_trainable(model, train_bias="all")
    """
    trained, frozen = _split(model, train_bias, trainable_layers)
    # A layer whose own flag is off hides its weights from Keras, whatever their flags say.
    for layer in (model, *model._flatten_layers(include_self=False)):
        if not layer.trainable:
            layer._trainable = True
    for variable in frozen:
        variable.trainable = False
    for variable in trained:
        variable.trainable = True
    # Moving statistics stand still only if the layer's own flag is off.
    for layer in model._flatten_layers():
        frozen_norm = isinstance(layer, keras.layers.BatchNormalization)
        if frozen_norm and not any(v.trainable for v in layer._trainable_variables):
            layer.trainable = False


def print_trainable_parameters(model: keras.layers.Layer) -> None:
    """Prints how many weights are trained, in PEFT's words.

    Args:
        model: A built model.

    Example:
        >>> print_trainable_parameters(model)
        trainable params: 132,480 || all params: 28,721,608 || trainable%: 0.4613
    """

    def count(variables: Iterable[Any]) -> int:
        return sum(int(keras.ops.size(v)) for v in variables)

    trained, total = count(model.trainable_weights), count(model.weights)
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
