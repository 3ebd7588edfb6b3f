"""Several adapters on one model: adding, activating, switching off and deleting them.

A LoRA model has one adapter or more, of which one or more are active. What it is in:

=========  ====================================================================================
state      the model's outputs, and what ``fit`` trains
=========  ====================================================================================
active     the base model with the active adapters, which are trained
disabled   inside ``with disable_adapters(model)``: the base model; nothing is trained
merged     the same outputs as before ``merge_lora_weights``; nothing is trained
=========  ====================================================================================

What may be done in it, and where it leads (a dash: raises ``ValueError`` and changes nothing):

==============================  ============================  ==============  =================
move                            active                        disabled        merged
==============================  ============================  ==============  =================
``add_adapter``,                one adapter more, the same    --              --
``combine_adapters``,           ones active
``load_adapter`` of a new name
``set_adapter(model, names)``   these are active, no others   --              --
``delete_adapter(model, n)``    one adapter less, the others  --              --
                                active as before
``swap_adapter``                the same, with other values   --              --
``disable_adapters``            disabled                      --              --
leaving its ``with`` block                                    the state       --
                                                              before it
``merge_lora_weights``          merged                        --              --
``unmerge_lora_weights``        --                            --              active
``fit``                         active, trained               --              --
``evaluate``, ``predict``       active                        disabled        merged
``save``, ``save_weights``      saved with all adapters       --              as if active
``save_adapter``,               the same state                disabled        merged
``convert_to_regular_model``
==============================  ============================  ==============  =================

``convert_to_regular_model`` merges the active adapters into a new model. These raise as well:

- a name that the model has not, or for a new adapter one that it has;
- activating none (use ``disable_adapters``), or adapters that cannot act together: two that both
  have values of their own for a weight of the model, such as a classifier; two in one layer whose
  methods do not combine, such as DoRA or OFT with any other;
- deleting the only adapter, or the only active one;
- ``fit`` when other weights are trained than those that the optimizer was made for: compile again.
  ``evaluate`` and ``predict`` need no new ``compile``; for a set of active adapters that they meet
  for the first time they are traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tfimm_lora.architectures.config import make_config
from tfimm_lora.lora.adapter_state import AdapterState, adapter_state
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.keeps_adapters import KeepsAdapters
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.layer_adapter import KERNEL_ARGUMENTS
from tfimm_lora.lora.methods.base import kernel_value
from tfimm_lora.models.features import FeatureExtractor


def add_adapter(model: keras.Model, name: str, **lora_fields: Any) -> None:
    """Adds an adapter to a LoRA model, in place. It is not active yet.

    It starts as the base model. Its weights of the model itself, such as a classifier that is
    trained in full, start with the base model's values and are its own from then on.

    Args:
        model: A LoRA model, or a feature extractor of one.
        name: Name of the adapter.
        **lora_fields: Fields that start with ``lora_``, see
            :class:`~tfimm_lora.lora.LoRAConfig`. They say all: nothing is taken over from other
            adapters.

    Raises:
        ValueError: The model is no LoRA model, the name is taken, a field is unknown, a target
            matches nothing or cannot be adapted, or adapters are switched off or merged. The model
            is as before.

    Example:
        >>> add_adapter(model, "birds", lora_rank=8, lora_train_classifier=False)
    """
    unknown = split_lora_values(lora_fields)[1]
    if unknown:
        raise ValueError(
            f"add_adapter takes fields that start with 'lora_', found "
            f"{', '.join(map(repr, unknown))}."
        )
    for field in KERNEL_ARGUMENTS:
        if lora_fields.get(field):
            raise ValueError(
                f"{field}={lora_fields[field]!r}: all adapters of a model share its kernels. Use "
                "lora.quantize(model, ...) to store these in another format, and leave it out."
            )
    if str(lora_fields.get("lora_init", "")).startswith("loftq"):
        raise ValueError(
            "lora_init='loftq' makes factors of what quantisation takes from the float kernels, "
            "which are gone when an adapter is added. Give it to the model's first adapter."
        )
    if lora_fields.get("lora_adapter_name", name) != name:
        raise ValueError(
            f"The adapter has two names, {name!r} and {lora_fields['lora_adapter_name']!r}. Leave "
            "lora_adapter_name out."
        )
    backbone, state = model_and_state(model)
    fields = make_config(LoRAConfig, {}, {**lora_fields, "lora_adapter_name": name})
    state.add(backbone, name, fields)
    for layer in backbone._flatten_layers():
        if isinstance(layer, LoRALayer) and name in layer.adapters:
            for update in layer.adapters[name].updates:
                if update.initializes:
                    update.initialize(kernel_value(layer, update.site))
    _follow(model)


def adapter_names(model: keras.Model) -> tuple[str, ...]:
    """Names of a model's adapters, in the order in which they were added.

    Args:
        model: A LoRA model, or a feature extractor of one.

    Raises:
        ValueError: The model is no LoRA model.

    Example:
        >>> adapter_names(model)
        ('default', 'birds')
    """
    return tuple(_state(model).fields)


def active_adapters(model: keras.Model) -> tuple[str, ...]:
    """Names of the adapters that act; none inside :func:`disable_adapters`.

    Args:
        model: A LoRA model, or a feature extractor of one.

    Raises:
        ValueError: The model is no LoRA model.

    Example:
        >>> active_adapters(model)
        ('default',)
    """
    return _state(model).active


def set_adapter(model: keras.Model, name_or_names: str | Sequence[str]) -> None:
    """Makes one adapter or several act, and no others. They are also what is trained.

    Updates of several add up; IA³'s gains multiply. A model that was compiled has to be compiled
    again before it is trained; ``evaluate`` and ``predict`` go on working. Functions that you
    compiled yourself, and models of your own around this one, have to be compiled again.

    Args:
        model: A LoRA model, or a feature extractor of one.
        name_or_names: Name of an adapter, or several.

    Raises:
        ValueError: There is no adapter of such a name, those named cannot act together, or
            adapters are switched off or merged. The model is as before.

    Example:
        >>> set_adapter(model, ["default", "birds"])
    """
    names = (name_or_names,) if isinstance(name_or_names, str) else tuple(name_or_names)
    backbone, state = model_and_state(model)
    if not names:
        raise ValueError(
            "set_adapter needs the name of an adapter. For the base model use 'with "
            "lora.disable_adapters(model):'."
        )
    state.activate(backbone, names)
    _follow(model)


@contextlib.contextmanager
def disable_adapters(model: keras.Model) -> Iterator[keras.Model]:
    """Switches all adapters off inside a ``with`` block: the model is its base model.

    Classifiers, biases and other weights that adapters train in place have the base model's values
    there. Afterwards, also after an exception, everything is as before, to the bit, ``trainable``
    flags included. Nothing else may be changed inside, and nothing trained or saved.

    Args:
        model: A LoRA model, or a feature extractor of one.

    Yields:
        The model.

    Raises:
        ValueError: The model is no LoRA model, adapters are switched off already or merged, or an
            active one changed weights of which no copy was kept (``lora_method="full"``).

    Example:
        >>> with disable_adapters(model):
        ...     base_outputs = model.predict(images)
    """
    backbone, state = model_and_state(model)
    state.disable(backbone)
    try:
        _follow(model)
        yield model
    finally:
        state.enable(backbone)
        _forget_functions(model)


def delete_adapter(model: keras.Model, name: str) -> None:
    """Removes an adapter and its weights, in place.

    Other active adapters stay active. When the first adapter goes, the next one is described by
    the model's config (``model.cfg``) in its place.

    Args:
        model: A LoRA model, or a feature extractor of one.
        name: Name of the adapter.

    Raises:
        ValueError: There is no such adapter, it is the only one or the only active one, or
            adapters are switched off or merged. The model is as before.

    Example:
        >>> delete_adapter(model, "birds")
    """
    backbone, state = model_and_state(model)
    state.delete(backbone, name)
    _follow(model)


def model_and_state(model: Any) -> tuple[Any, AdapterState]:
    """Returns the model that has the adapters, and their state.

    Args:
        model: A LoRA model, or a feature extractor of one.

    Raises:
        ValueError: The model cannot have several adapters.
    """
    backbone = model.backbone if isinstance(model, FeatureExtractor) else model
    state = adapter_state(backbone)
    if not isinstance(backbone, KeepsAdapters):
        raise ValueError(
            f"{type(backbone).__name__} has one adapter and can have no others. Derive its class "
            "from lora.LoRAModel, or convert the regular model with lora.convert_to_lora_model."
        )
    return backbone, state


def _state(model: Any) -> AdapterState:
    return adapter_state(model.backbone if isinstance(model, FeatureExtractor) else model)


def _follow(model: Any) -> None:
    """Lets an extractor follow its backbone: trained is only what its maps depend on."""
    if isinstance(model, FeatureExtractor) and model.freeze_unused:
        for layer in model.backbone.layers_behind(model.out_indices[-1], model.norm):
            for variable in layer.variables:
                variable.trainable = False
    _forget_functions(model)


def _forget_functions(model: Any) -> None:
    # A model that has adapters itself keeps its functions apart for each set of active ones.
    if isinstance(model, FeatureExtractor):
        model.train_function = model.test_function = model.predict_function = None
