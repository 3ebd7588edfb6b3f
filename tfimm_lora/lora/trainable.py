"""Which weights are trained.

The truth is the ``trainable`` flag of every variable; the functions here compute and set it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.lora.config import TRAIN_BIAS, LoRAConfig
from tfimm_lora.lora.layer import LoRALayer, is_adapted
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.weights.adapt import is_below
from tfimm_lora.weights.names import (
    NamedVariable,
    is_lora_weight,
    is_stored,
    iterate_layers,
    named_variables,
    timm_path,
)

_BIASES = ("bias", "beta")


def _split(
    model: keras.layers.Layer, wanted: Callable[[NamedVariable], bool]
) -> tuple[list[Any], list[Any]]:
    """Splits all weights into trained ones, of active adapters or wanted, and frozen ones."""
    adapted = [layer for layer in model._flatten_layers() if isinstance(layer, LoRALayer)]
    inactive = {
        id(v)
        for layer in adapted
        for name, adapter in layer.adapters.items()
        if name not in layer.active_adapters
        for v in adapter.variables
    }
    trained: list[Any] = []
    frozen: list[Any] = []
    for v in named_variables(model):
        # Moving statistics and the like are not for an optimizer, wherever they are.
        fixed = any(w is v.variable for w in v.layer._non_trainable_variables)
        own = is_lora_weight(v.leaf) and id(v.variable) not in inactive
        (trained if (own or wanted(v)) and not fixed else frozen).append(v.variable)
    return trained, frozen


def _by_arguments(
    model: keras.layers.Layer, train_bias: str, trainable_layers: Iterable[str] | None
) -> tuple[list[Any], list[Any]]:
    if train_bias not in TRAIN_BIAS:
        raise ValueError(f"Unknown train_bias {train_bias!r}. Use one of {', '.join(TRAIN_BIAS)}.")
    modules = [m.replace("/", ".") for m in trainable_layers or ()]
    variables = named_variables(model)
    for module in modules:
        if not any(is_below(v.name, module) for v in variables):
            raise ValueError(f"trainable_layers: the model has no weights below {module!r}.")

    in_place = _trained_in_place(model)

    def wanted(v: NamedVariable) -> bool:
        in_full = id(v.variable) in in_place or any(is_below(v.name, m) for m in modules)
        return in_full or _is_trained_bias(v, train_bias, None)

    return _split(model, wanted)


def _trained_in_place(model: Any) -> set[int]:
    """Weights, by identity, of active adapters whose method works in place."""
    state = getattr(model, "_adapter_state", None)
    active = {} if state is None else {name: state.fields[name] for name in state.active}
    return {
        id(v.variable)
        for name, fields in active.items()
        if METHODS[getattr(fields, "lora_method", "lora")].in_place
        for v in stored_variables(model, name, fields)
    }


def _is_trained_bias(v: NamedVariable, train_bias: str, adapter: str | None) -> bool:
    """Whether a bias mode trains a weight; ``lora_only`` asks for the adapter, or for any."""
    if v.leaf not in _BIASES or train_bias == "none":
        return False
    if train_bias == "all":
        return True
    return is_adapted(v.layer) and (adapter is None or adapter in v.layer.adapters)


def stored_variables(model: Any, name: str, fields: LoRAConfig) -> list[NamedVariable]:
    """Lists the weights of the model itself that an adapter trains, and that belong to it.

    These are the classifier and other layers that are trained in full, biases, and what a method
    trains that adapts no layer.

    Args:
        model: A built model.
        name: Name of the adapter.
        fields: Its config.

    Raises:
        ValueError: The config names a layer that has no weights.
    """
    modules = fully_trained_layers(model, name, fields)
    method = METHODS[fields.lora_method]
    variables = named_variables(model)
    for module in modules:
        if not any(is_below(v.name, module) for v in variables):
            raise ValueError(f"lora_modules_to_save: the model has no weights below {module!r}.")

    def stored(v: NamedVariable) -> bool:
        if is_lora_weight(v.leaf) or any(w is v.variable for w in v.layer._non_trainable_variables):
            return False
        in_place = method.in_place and method.trains(v, fields)
        in_full = any(is_below(v.name, m) for m in modules)
        return in_place or in_full or _is_trained_bias(v, fields.lora_train_bias, name)

    return [v for v in variables if stored(v)]


def kept_variables(model: Any, name: str, fields: LoRAConfig) -> list[NamedVariable]:
    """Lists the weights of the model itself that are other ones while an adapter is active.

    These are :func:`stored_variables` and the moving statistics of the batch normalisations among
    their layers, which move as soon as such a layer is trained.

    Args:
        model: A built model.
        name: Name of the adapter.
        fields: Its config.
    """
    stored = stored_variables(model, name, fields)
    ids = {id(v.variable) for v in stored}
    moving = {id(v.layer) for v in stored if isinstance(v.layer, keras.layers.BatchNormalization)}
    return stored + [
        v for v in named_variables(model) if id(v.layer) in moving and id(v.variable) not in ids
    ]


def check_float(variables: Iterable[NamedVariable]) -> None:
    """Raises if one of some weights, which are to be trained, is a packed kernel.

    Raises:
        ValueError: Says which.
    """
    for v in variables:
        if is_stored(v.variable):
            raise ValueError(
                f"{v.name} is stored as {v.variable.format.name}, so it cannot be trained. Store "
                f"it in float first: lora.quantize(model, {{{v.module!r}: None}})."
            )


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
    return _by_arguments(model, train_bias, trainable_layers)[0]


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
    return _by_arguments(model, train_bias, trainable_layers)[1]


def fully_trained_layers(
    model: Any, name: str | None = None, fields: LoRAConfig | None = None
) -> list[str]:
    """Lists the layers that an adapter trains in full.

    With ``lora_train_classifier=None`` the classifier is trained if it is fresh, that is if its
    number of classes is not that of the checkpoint.

    Args:
        model: A model with a LoRA config.
        name: Name of the adapter; the first one by default.
        fields: The adapter's config; the model's by default.

    Returns:
        timm paths: the classifier if it is trained, and ``lora_modules_to_save``.
    """
    fields = own_config(model) if fields is None else fields
    name = getattr(fields, "lora_adapter_name", "default") if name is None else name
    wanted = getattr(fields, "lora_train_classifier", None)
    if METHODS[getattr(fields, "lora_method", "lora")].trains_classifier:
        wanted = True
    if wanted is None:
        facts = getattr(model, "pretrained_cfg", None)
        classes = getattr(getattr(model, "cfg", None), "nb_classes", 0)
        wanted = facts is not None and classes != facts.num_classes
    modules = list(getattr(fields, "lora_modules_to_save", ()))
    if not wanted:
        return modules
    layers = {timm_path(path): layer for path, layer in iterate_layers(model)}
    # A headless model has no classifier, and an adapted one is not trained in full.
    classifiers = [
        p
        for p in classifier_of(model)
        if p in layers and name not in getattr(layers[p], "adapters", ())
    ]
    return [*(p for p in classifiers if p not in modules), *modules]


def classifier_of(model: Any) -> tuple[str, ...]:
    """Paths of a model's classification layers in timm's spelling."""
    found = getattr(model, "lora_classifier", None)
    return classifier_paths(getattr(model, "cfg", None)) if found is None else (found,)


def own_config(model: Any) -> Any:
    """The config that holds a model's LoRA fields."""
    return model.lora_cfg if hasattr(model, "lora_cfg") else model.cfg


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
    _set_flags(model, *_by_arguments(model, train_bias, trainable_layers))


def set_trainable_of(model: Any, adapters: Mapping[str, LoRAConfig]) -> None:
    """Sets the ``trainable`` flags as the configs of some adapters say.

    Args:
        model: A built model.
        adapters: Configs of the active adapters by name.
    """
    stored = {id(v.variable) for n, f in adapters.items() for v in stored_variables(model, n, f)}
    _set_flags(model, *_split(model, lambda v: id(v.variable) in stored))


def _set_flags(model: Any, trained: list[Any], frozen: list[Any]) -> None:
    # A layer whose own flag is off hides its weights from Keras, whatever their flags say.
    for layer in (model, *model._flatten_layers(include_self=False)):
        if not layer.trainable:
            layer._trainable = True
    for variable in frozen:
        variable.trainable = False
    for variable in trained:
        variable.trainable = True
        # TensorFlow records a variable for its gradient only if it was trainable when it got its
        # first value, which was later than when the flags were set.
        value: Any = getattr(variable, "_value", None)
        if getattr(value, "trainable", True) is False:
            value._trainable = True
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
    for v in (v.variable for v in named_variables(model)):
        if is_stored(v):
            # Its weights, not the bytes they are packed in.
            total += math.prod(v.shape) - count(v.variables.values())
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
