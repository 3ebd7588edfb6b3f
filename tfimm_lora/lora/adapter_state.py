"""Which adapters a model has and which of them act: the state behind add, set, disable, delete.

An adapter consists of its variables in the adapted layers, which are always there, and of weights
of the model itself that it trains (a classifier, biases): of these every adapter has its own
values. Those of the active adapters are in the model; those of the others, and those that the base
model has, are kept here. The states and moves are those of :mod:`tfimm_lora.lora.several`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import base_config_values
from tfimm_lora.lora.compiled_functions import CompiledFunctions
from tfimm_lora.lora.config import LoRAConfig, check_adapter_name, split_lora_values
from tfimm_lora.lora.connect import connect_adapter, disconnect_adapter
from tfimm_lora.lora.insertion import insert_adapter
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.trainable import (
    check_float,
    kept_variables,
    own_config,
    set_trainable_of,
)
from tfimm_lora.weights.names import NamedVariable, variable_value


class AdapterState:
    """The adapters of one model.

    Attributes:
        fields: Config of every adapter by name, in the order in which they were added. The first
            one is the model's own config.
        active: Names of the adapters that act.
        kept: Values of the model's own weights by timm name: under the name of an adapter that is
            not active those that it has trained, under ``""`` those that the base model has where
            an active adapter has others.
        base_is_known: Whether the values of the base model came with the weights, so that those
            in the model are no longer the base model's.
        rank_histories: Steps and ranks that AdaLoRA has gone through, by adapter.
        functions: The model's compiled functions, which depend on the active adapters.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.active: tuple[str, ...] = tuple(fields)[:1]
        self.kept: dict[str, dict[str, np.ndarray]] = {"": {}}
        self.base_is_known = False
        self.functions = CompiledFunctions()
        self.rank_histories: dict[str, dict[str, Any]] = {}
        self._before: tuple[str, ...] = ()
        self._flags: list[tuple[Any, str, bool]] = []

    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off for a while."""
        return bool(self._before)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the adapters that act, or will when they are switched on again."""
        return self._before or self.active

    def settle(self, model: Any) -> None:
        """Sets the ``trainable`` flags and remembers the base values of what is trained in place.

        To be called when the model has been built, and when it has got its base weights. A call
        after trained weights were read from a file, which has the base values beside them, leaves
        these alone.
        """
        for name in self.fields:
            connect_adapter(model, name)
        self.set_flags(model)
        if self.base_is_known:
            return
        self.kept[""] = {
            v.name: variable_value(v.variable)
            for name in self.active
            if METHODS[self.fields[name].lora_method].keeps_base
            for v in self.own_weights(model, name)
        }

    def own_weights(self, model: Any, name: str) -> list[NamedVariable]:
        """Weights of the model itself of which an adapter has its own values."""
        return kept_variables(model, name, self.fields[name])

    def set_flags(self, model: Any) -> None:
        """Sets the ``trainable`` flag of every weight: what the active adapters train."""
        set_trainable_of(model, {name: self.fields[name] for name in self.active})

    def add(self, model: Any, name: str, fields: LoRAConfig) -> None:
        """Adds an adapter to the layers, which is not active. An error leaves the model as it was.

        Raises:
            ValueError: The name is taken or unfit, or a target cannot be adapted.
        """
        check_adapter_name(name)
        if name in self.fields:
            raise ValueError(
                f"The model has an adapter {name!r} already (it has {', '.join(self.fields)}). "
                "Use another name, or lora.delete_adapter(model, name) first."
            )
        self.check_open(model)
        try:
            insert_adapter(model, name, fields)
            # The first adapter of a layer would act at once.
            self._set_layers(model, self.active)
            self.fields[name], self.kept[name] = fields, {}
            if model.built:
                connect_adapter(model, name)
                check_float(self.own_weights(model, name))
                self.set_flags(model)
        except Exception:
            self._remove(model, name)
            raise

    def activate(self, model: Any, names: Sequence[str]) -> None:
        """Makes some adapters act, and no others.

        Raises:
            ValueError: A name is unknown, adapters are merged, or they cannot act together.
        """
        self.check_active(model, names)
        self._exchange(model, names)
        self.set_flags(model)

    def _exchange(self, model: Any, names: Sequence[str]) -> None:
        base = self.kept[""]
        for name in [n for n in self.active if n not in names]:
            own = self.own_weights(model, name)
            self.kept[name] = {v.name: variable_value(v.variable) for v in own}
            for v in own:
                v.variable.assign(base.pop(v.name))
        for name in [n for n in names if n not in self.active]:
            values = self.kept.pop(name, {})
            for v in self.own_weights(model, name):
                base[v.name] = variable_value(v.variable)
                v.variable.assign(values.get(v.name, base[v.name]))
        self._set_layers(model, names)
        self.active = tuple(names)

    def _set_layers(self, model: Any, names: Sequence[str]) -> None:
        for layer in model._flatten_layers():
            if isinstance(layer, LoRALayer):
                layer.set_adapters(names)

    def disable(self, model: Any) -> None:
        """Switches all adapters off, until :meth:`enable`.

        Raises:
            ValueError: They are off, or merged, or what they train in place has no base values.
        """
        self.check_active(model, ())
        before, self._flags = self.active, _flags_of(model)
        self.activate(model, ())
        self._before = before

    def enable(self, model: Any) -> None:
        """Restores the state in front of :meth:`disable`, flags that were set by hand included."""
        self._exchange(model, self._before)
        _restore_flags(self._flags)
        self._before, self._flags = (), []

    @contextlib.contextmanager
    def guest(self, model: Any, fields: LoRAConfig) -> Iterator[str]:
        """Adds an adapter inside a ``with`` block; compiled functions do not notice.

        Yields:
            Its name.

        Raises:
            ValueError: As :meth:`add`.
        """
        name = next(n for i in itertools.count() if (n := f"guest-{i}") not in self.fields)
        flags = _flags_of(model)
        try:
            self.add(model, name, dataclasses.replace(fields, lora_adapter_name=name))
            yield name
        finally:
            self._remove(model, name)
            _restore_flags(flags)

    def restore(
        self, model: Any, kept: dict[str, dict[str, np.ndarray]], active: Sequence[str]
    ) -> None:
        """Takes over what a weights file says; the weights in the model are or will be its own.

        Args:
            model: The model.
            kept: As :attr:`kept`.
            active: Names of the adapters that act.

        Raises:
            ValueError: The values are not those of this model's adapters.
        """
        for name in active:
            self.check_known(name)
        for name in ("", *self.fields):
            owners = active if not name else [name]
            own = {v.name: v.variable for n in owners for v in self.own_weights(model, n)}
            if not name:
                # What this model leaves frozen, such as a head that is no longer new, stays as it
                # was when it was saved.
                kept = {**kept, "": {k: v for k, v in kept.get("", {}).items() if k in own}}
            for key, value in kept.get(name, {}).items():
                if key not in own or tuple(own[key].shape) != tuple(value.shape):
                    raise ValueError(
                        f"The file has values of {key} of shape {tuple(value.shape)} for "
                        f"{name or 'the base model'!r}; the model has "
                        f"{tuple(own[key].shape) if key in own else 'no such weight there'}."
                    )
        for layer in model._flatten_layers():
            if isinstance(layer, LoRALayer) and layer.merged:
                layer.unmerge_weights()
        self._set_layers(model, active)
        changed, self.active = tuple(active) != self.active, tuple(active)
        self.kept, self.base_is_known = kept, True
        if changed:
            self.set_flags(model)

    def check_active(self, model: Any, names: Sequence[str]) -> None:
        """Raises unless adapters can be made active.

        Raises:
            ValueError: Says what is in the way.
        """
        for name in names:
            self.check_known(name)
        if len(set(names)) < len(names):
            raise ValueError(f"An adapter is named twice: {', '.join(names)}.")
        self.check_open(model)
        for name in [n for n in self.active if n not in names]:
            own = self.own_weights(model, name)
            missing = [v.name for v in own if v.name not in self.kept[""]]
            if missing:
                raise ValueError(
                    f"{name!r} ({self.fields[name].lora_method}) trains weights of the model "
                    f"itself ({missing[0]}, ...) and no copy of the base model's is kept, so it "
                    "cannot be switched off. Use lora.convert_to_regular_model(model), or load "
                    "the base model again."
                )
        owner: dict[str, str] = {}
        for name in names:
            for v in self.own_weights(model, name):
                if owner.setdefault(v.name, name) != name:
                    raise ValueError(
                        f"The adapters {owner[v.name]!r} and {name!r} both have values of their "
                        f"own for {v.name}, so they cannot act together. Activate one of them."
                    )
        for layer in model._flatten_layers():
            if isinstance(layer, LoRALayer):
                layer.check_together(names)

    def check_known(self, name: str) -> None:
        """Raises unless there is an adapter of a name.

        Raises:
            ValueError: There is none.
        """
        if name not in self.fields:
            raise ValueError(
                f"The model has no adapter {name!r}. It has {', '.join(self.fields)}. "
                "lora.add_adapter adds one, lora.load_adapter loads one."
            )

    def check_open(self, model: Any) -> None:
        """Raises while nothing may change: adapters are switched off for a while, or merged.

        Raises:
            ValueError: They are.
        """
        self.check_enabled()
        self.check_unmerged(model)

    def check_enabled(self) -> None:
        """Raises while the adapters are switched off.

        Raises:
            ValueError: They are.
        """
        if self.disabled:
            raise ValueError(
                f"The adapters ({', '.join(self._before)}) are switched off inside "
                "lora.disable_adapters(model). Leave the 'with' block first."
            )

    def check_unmerged(self, model: Any) -> None:
        """Raises while adapters are merged into the kernels.

        Raises:
            ValueError: They are.
        """
        if any(isinstance(la, LoRALayer) and la.merged for la in model._flatten_layers()):
            raise ValueError(
                "The model's LoRA weights are merged. Call unmerge_lora_weights first."
            )

    def value_of(self, name: str, variable: NamedVariable) -> np.ndarray:
        """The value that a weight of the model itself has under an adapter, nothing merged.

        Args:
            name: Name of the adapter that stores the weight; ``""`` for the base model's value.
            variable: The weight.
        """
        if name not in self.active:
            for source in (self.kept.get(name, {}), self.kept[""]):
                if variable.name in source:
                    return source[variable.name]
        if isinstance(variable.layer, LoRALayer):
            return variable.layer.unmerged_value(variable.variable)
        return variable_value(variable.variable)

    def delete(self, model: Any, name: str) -> None:
        """Removes an adapter, which is not the last and not the only active one.

        Raises:
            ValueError: There is none of this name, or the model would be left without.
        """
        self.check_known(name)
        self.check_open(model)
        if len(self.fields) == 1:
            raise ValueError(
                f"{name!r} is the model's only adapter. lora.convert_to_regular_model(model) "
                "merges it; for the base model's outputs use lora.disable_adapters(model)."
            )
        rest = tuple(n for n in self.active if n != name)
        if not rest:
            others = ", ".join(n for n in self.fields if n != name)
            raise ValueError(
                f"{name!r} is the only active adapter. Activate another one ({others}) with "
                "lora.set_adapter(model, name) first."
            )
        if name in self.active:
            self.activate(model, rest)
        first = next(iter(self.fields))
        self._remove(model, name)
        if name == first:
            self._describe_first(model)
        self.functions.clear()
        self.set_flags(model)

    def _remove(self, model: Any, name: str) -> None:
        for layer in model._flatten_layers():
            if isinstance(layer, LoRALayer) and name in layer.adapters:
                layer.delete_adapter(name)
        disconnect_adapter(model, name, self.fields.get(name))
        self.fields.pop(name, None)
        self.kept.pop(name, None)

    def _describe_first(self, model: Any) -> None:
        """Makes the model's config that of the adapter that has become the first."""
        name, fields = next(iter(self.fields.items()))
        lora = {
            f.name: getattr(fields, f.name)
            for f in dataclasses.fields(LoRAConfig)
            if f.name.startswith("lora_")
        }
        cfg = dataclasses.replace(own_config(model), **{**lora, "lora_adapter_name": name})
        setattr(model, "lora_cfg" if hasattr(model, "lora_cfg") else "cfg", cfg)
        self.fields[name] = cfg


def _flags_of(model: Any) -> list[tuple[Any, str, bool]]:
    layers = [(layer, "_trainable") for layer in model._flatten_layers()]
    variables = [(variable, "trainable") for variable in model.variables]
    return [(o, attribute, getattr(o, attribute)) for o, attribute in layers + variables]


def _restore_flags(flags: list[tuple[Any, str, bool]]) -> None:
    for owner, attribute, value in flags:
        setattr(owner, attribute, value)


def adapter_state(model: Any) -> AdapterState:
    """The state of a model's adapters.

    Raises:
        ValueError: The model has no adapters and cannot have any.
    """
    state = getattr(model, "_adapter_state", None)
    if state is None and lora_layers(model) and hasattr(model, "cfg"):
        # A variant of a user's own, whose config may have only some of the fields.
        values = base_config_values(own_config(model), LoRAConfig)
        state = AdapterState({"default": LoRAConfig(**split_lora_values(values)[0])})
        model._adapter_state = state
    if state is None:
        raise ValueError(
            f"{model.name!r} is no LoRA model. Use lora.convert_to_lora_model(model) first."
        )
    return state
