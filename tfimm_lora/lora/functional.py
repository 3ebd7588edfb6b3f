"""LoRA versions of functional and Sequential models.

The model is restored from its config, and its graph run through again with LoRA layers in place of
the targets. Targets inside a composite layer (``keras.layers.MultiHeadAttention``, KerasHub's
encoders) are exchanged in it. The result remembers the config of the regular model and the LoRA
fields, and is restored from a file by the same steps, so that nothing depends on how a composite
layer serialises.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import keras

from tfimm_lora.architectures.config import config_to_dict, make_config
from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.keeps_adapters import KeepsAdapters
from tfimm_lora.lora.layers import convert_to_lora_layer, is_adaptable
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.quantizing import assign_formats
from tfimm_lora.lora.targets import find_targets
from tfimm_lora.lora.trainable import fully_trained_layers
from tfimm_lora.models.replace import parent_of, replace_sublayer
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.quantization.layers import QUANTIZED_LAYERS
from tfimm_lora.quantization.planning import check_formats, storing_layers
from tfimm_lora.quantization.registry import split_group_size
from tfimm_lora.weights.names import LORA_WEIGHT_NAMES, iterate_layers, timm_path


def is_functional(model: Any) -> bool:
    """Whether a model is functional or Sequential (subclasses such as KerasHub's included)."""
    return isinstance(model, (keras.Sequential,)) or (
        isinstance(model, keras.Model) and hasattr(model, "operations") and bool(model.outputs)
    )


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LoRAFunctional(KeepsAdapters, keras.Model):
    """A functional model with LoRA layers; made by ``convert_to_lora_model``.

    Attributes:
        lora_cfg: The LoRA fields it was made with.
        lora_classifier: Path of the last layer that can be adapted, which classifies.
    """

    lora_cfg: LoRAConfig
    lora_classifier: str
    _base_config: str

    def __init__(self, inputs: Any, outputs: Any, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The regular model's config and the LoRA fields."""
        lora, _ = split_lora_values(config_to_dict(self.lora_cfg))
        base = json.loads(self._base_config)
        return {"base": base, "lora": lora, **self._further_config()}

    @property
    def lora_trainable_layers(self) -> list[str]:
        """Paths of layers that are trained in full."""
        return fully_trained_layers(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> keras.Model:
        """Restores the regular model and converts it again."""
        text = json.dumps(config["base"])
        model = _convert(_restore(text, custom_objects), text, config["lora"])
        model._add_further(config.get("lora_adapters", {}), config.get("lora_active"))
        return model


def _restore(text: str, custom_objects: Any = None) -> keras.Model:
    """Builds a model with fresh weights from its serialised config."""
    return keras.saving.deserialize_keras_object(json.loads(text), custom_objects)


def _last_adaptable(model: keras.Model) -> str:
    """Path of the last layer that could be adapted, which classifies."""
    paths = [path for path, layer in iterate_layers(model) if is_adaptable(layer)]
    return timm_path(paths[-1]) if paths else ""


def convert_functional_model(model: keras.Model, fields: dict[str, Any]) -> LoRAFunctional:
    """Creates the LoRA version of a functional or Sequential model.

    Args:
        model: A built model; it is not changed.
        fields: ``lora_`` fields. Targets default to every layer that can be adapted; with
            ``lora_train_classifier=True`` the last of them is trained in full instead.

    Returns:
        The LoRA model, with the model's weights.

    Raises:
        ValueError: The model is not built, a field is unknown or a target matches nothing.
    """
    if not model.built or not model.outputs:
        raise ValueError(
            f"{model.name!r} is not built: give it an input (keras.Input), or call it once."
        )
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    # As text: Keras would track a dictionary, and takes apart the ones it restores from.
    text = json.dumps(config)
    lora_model = _convert(_restore(text), text, fields)
    transfer_weights(model, lora_model, LORA_WEIGHT_NAMES)
    return lora_model


def _convert(fresh: keras.Model, text: str, fields: dict[str, Any]) -> LoRAFunctional:
    """Turns a restored regular model, whose layers are used up, into a LoRA model."""
    cfg = make_config(LoRAConfig, {}, fields)
    last = _last_adaptable(fresh)
    classifier = last if cfg.lora_train_classifier else ""
    in_place = METHODS[cfg.lora_method].in_place
    targets = [] if in_place else find_targets(fresh, cfg, ("all",), {}, {}, (classifier,))
    if classifier in [t.module for t in targets]:
        raise ValueError(
            f"The classifier {classifier!r} is targeted by lora_targets and trained in full by "
            "lora_train_classifier=True. Use one of the two."
        )
    clone = _clone(fresh, {id(t.layer) for t in targets})
    lora_model = LoRAFunctional(*_structure(clone), name=fresh.name)
    lora_model.lora_cfg = cfg
    lora_model.lora_classifier = last
    METHODS[cfg.lora_method].check_model(lora_model, cfg)
    lora_model._base_config = text
    lora_model._adapter_state = AdapterState({cfg.lora_adapter_name: cfg})
    if cfg.lora_quantization is not None:
        # Before there are adapters, whose shapes may depend on the groups.
        method = METHODS[cfg.lora_method]
        planned = assign_formats(
            lora_model,
            cfg.lora_quantization,
            cfg.lora_group_size,
            cfg.lora_quantize_merged,
            adapting={t.module: (method, t.arguments["lora_options"] or {}) for t in targets},
        )
        check_formats(lora_model, planned, "lora_group_size")
    for path, layer in iterate_layers(lora_model):
        arguments = {t.path: t.arguments for t in targets}.get(path)
        if arguments is not None:
            layer.add_adapter(cfg.lora_adapter_name, **arguments)
    lora_model._adapter_state.settle(lora_model)
    return lora_model


def _clone(fresh: keras.Model, targeted: set[int]) -> keras.Model:
    """The model with every layer that can be adapted as LoRA layer, adapted now or later."""
    adaptable = targeted | {
        id(la)
        for _, la in iterate_layers(fresh)
        if is_adaptable(la) and la.built and not getattr(la, "lora_enabled", False)
    }

    def choose(layer: Any) -> Any:
        if id(layer) not in adaptable:
            return layer
        return convert_to_lora_layer(_unbuilt(layer), lora_method=None)

    # A functional subclass (KerasHub's backbones) becomes a plain functional model.
    plain = keras.Model(*_structure(fresh), name=fresh.name)
    clone = keras.models.clone_model(plain, clone_function=choose, recursive=True)
    for path, layer in list(iterate_layers(clone)):
        if id(layer) in adaptable:
            _exchange(clone, path, layer)
    return clone


def _unbuilt(layer: Any) -> Any:
    return layer.__class__.from_config(layer.get_config())


def _structure(model: keras.Model) -> tuple[Any, Any]:
    """Symbolic inputs and outputs, nested as the model's call takes and returns them."""

    def single(tensors: Any) -> Any:
        return tensors[0] if len(tensors) == 1 else tensors

    inputs = getattr(model, "_inputs_struct", None)
    outputs = getattr(model, "_outputs_struct", None)
    return (
        single(model.inputs) if inputs is None else inputs,
        single(model.outputs) if outputs is None else outputs,
    )


def _exchange(model: keras.Model, path: str, layer: Any) -> None:
    """Exchanges a layer inside a built composite one."""
    new = convert_to_lora_layer(_unbuilt(layer), lora_method=None)
    with contextlib.ExitStack() as scopes:
        # The names of the parents, so that the new variables get the paths of the old ones.
        for part in path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(part))
        new.build(layer.get_build_config()["input_shape"])
    replace_sublayer(parent_of(model, layer), layer, new)


def regular_functional_model(model: LoRAFunctional) -> keras.Model:
    """Restores the regular model that a LoRA model was made from, with fresh weights."""
    return _restore(model._base_config)


def quantized_functional_model(
    model: LoRAFunctional, formats: Mapping[str, str | None]
) -> keras.Model:
    """The regular model that a LoRA model was made from, with packed kernels and fresh weights.

    Args:
        model: The LoRA model.
        formats: Formats by timm path, with group sizes.

    Raises:
        ValueError: A layer lies inside a composite one, whose class restores it in float.
    """
    fresh = _restore(model._base_config)
    named = {id(layer): formats.get(timm_path(path)) for path, layer in iterate_layers(fresh)}

    def choose(layer: Any) -> Any:
        format = named.get(id(layer))
        if format is None:
            return layer
        name, size = split_group_size(format)
        fields = {"quantization": name, "group_size": size}
        return QUANTIZED_LAYERS[type(layer)].from_config({**layer.get_config(), **fields})  # type: ignore[attr-defined]

    plain = keras.Model(*_structure(fresh), name=fresh.name)
    clone = keras.models.clone_model(plain, clone_function=choose, recursive=True)
    packed = storing_layers(clone)
    inside = [path for path, format in formats.items() if format and path not in packed]
    if inside:
        raise ValueError(
            f"keep_quantized=True: {inside[0]!r} lies inside a composite layer, which a saved "
            "model would restore in float. Leave keep_quantized out, or store the layer in float: "
            f"lora.quantize(model, {{{inside[0]!r}: None}})."
        )
    return clone
