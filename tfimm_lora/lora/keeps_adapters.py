"""What models with adapters do otherwise than Keras': configs, files, compiled functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import config_to_dict, make_config
from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.per_example import TakesAdapterIds
from tfimm_lora.lora.training_hooks import TrainsAdapters
from tfimm_lora.quantization.recompute import ExportsKernels

FACTS = "lora_adapters:"
"""Key in a weights file under which the names of all and of the active adapters stand."""


class KeepsAdapters(TrainsAdapters, TakesAdapterIds, ExportsKernels):
    """Mixin of models with adapters: their configs and kept values travel with the model."""

    _adapter_state: AdapterState
    built: bool

    def _add_further(self, further: Mapping[str, Any], active: Iterable[str] | None) -> None:
        """Adds the adapters of :meth:`_further_config`; the weights are still to come."""
        state = self._adapter_state
        for name, values in further.items():
            state.add(self, name, make_config(LoRAConfig, {}, dict(values)))
        if active is not None:
            state.active = tuple(active)
            for layer in self._flatten_layers():  # type: ignore[attr-defined]
                if isinstance(layer, LoRALayer):
                    layer.set_adapters(state.active)
            if self.built:
                state.settle(self)

    def _further_config(self) -> dict[str, Any]:
        """What the config has to say beside the first adapter, which is in the model's own."""
        state = self._adapter_state
        first, *others = state.fields
        if not others and state.chosen == (first,):
            return {}
        fields = {n: split_lora_values(config_to_dict(state.fields[n]))[0] for n in others}
        return {"lora_adapters": fields, "lora_active": list(state.chosen)}

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Keras' ``save``; not while adapters are switched off."""
        self._adapter_state.check_enabled()
        super().save(*args, **kwargs)  # type: ignore[misc]

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        """Keras' ``save_weights``; not while adapters are switched off."""
        self._adapter_state.check_enabled()
        optimizer = getattr(self, "optimizer", None)
        if self._optimizer_is_stale():
            self.optimizer = None
        try:
            super().save_weights(*args, **kwargs)  # type: ignore[misc]
        finally:
            if optimizer is not None:
                self.optimizer = optimizer

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """Keras' ``load_weights``, which also restores which adapters are active."""
        self._adapter_state.check_enabled()
        super().load_weights(*args, **kwargs)  # type: ignore[misc]
        # Does nothing if the file had the base values; else those in the model now are these.
        self._adapter_state.settle(self)

    def get_compile_config(self) -> Any:
        """Keras' compile config; none if the optimizer's state belongs to other weights."""
        if self._optimizer_is_stale():
            return None
        return super().get_compile_config()  # type: ignore[misc]

    def _optimizer_is_stale(self) -> bool:
        """Whether the optimizer's state belongs to other weights than those trained now."""
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None or not optimizer.built:
            return False
        known = [id(v) for v in optimizer._trainable_variables]
        return known != [id(v) for v in self.trainable_variables]  # type: ignore[attr-defined]

    def save_own_variables(self, store: Any) -> None:
        """Writes the model's own variables and the kept values of its adapters."""
        state = self._adapter_state
        state.check_enabled()
        super().save_own_variables(store)  # type: ignore[misc]
        facts = {"adapters": list(state.fields), "active": list(state.active)}
        store[FACTS] = np.frombuffer(json.dumps(facts).encode(), "uint8")
        for name, values in state.kept.items():
            for key, value in values.items():
                store[f"{name}:{key}"] = value

    def load_own_variables(self, store: Any) -> None:
        """Reads what :meth:`save_own_variables` wrote.

        Raises:
            ValueError: The file is that of a model with other adapters.
        """
        state, keys = self._adapter_state, list(store.keys())
        state.check_enabled()
        super().load_own_variables({k: store[k] for k in keys if ":" not in k})  # type: ignore[misc]
        if FACTS not in keys:
            state.base_is_known = False
            return
        facts = json.loads(bytes(np.asarray(store[FACTS])))
        if set(facts["adapters"]) != set(state.fields):
            raise ValueError(
                f"The file holds the adapters {', '.join(facts['adapters'])}, the model has "
                f"{', '.join(state.fields)}. Give the model the same ones with lora.add_adapter "
                "and lora.delete_adapter first, or load a .keras file, which says how."
            )
        kept: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("", *state.fields)}
        for key in keys:
            name, _, variable = key.partition(":")
            if variable:
                kept[name][variable] = np.asarray(store[key])
        state.restore(self, kept, facts["active"])

    def weights_transferred(self, source: Any) -> None:
        """Takes note that the weights are now those of another model.

        Args:
            source: The other model: a regular one, or one with the same adapters.
        """
        state, other = self._adapter_state, getattr(source, "_adapter_state", None)
        state.base_is_known = False
        state.settle(self)
        if other is None or other.disabled or set(other.fields) != set(state.fields):
            return
        kept: dict[str, dict[str, np.ndarray]] = {}
        for name, values in other.kept.items():
            shapes = {
                v.name: tuple(v.variable.shape)
                for n in (other.active if not name else [name])
                for v in state.own_weights(self, n)
            }
            kept[name] = {k: v for k, v in values.items() if shapes.get(k) == tuple(v.shape)}
        if other.active == state.active:
            kept[""] = {**state.kept[""], **kept[""]}
        state.restore(self, kept, other.active)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras' own, for the active adapters.

        Raises:
            ValueError: The adapters are switched off, or the model has to be compiled again.
        """
        state = self._adapter_state
        state.check_enabled()
        if self._optimizer_is_stale():
            raise ValueError(
                "The model trains other weights than when it was compiled (active now: "
                f"{', '.join(state.active)}). Call model.compile(...) again, with a new optimizer."
            )
        self._choose("train_function")
        return super().make_train_function(force=force)  # type: ignore[misc]

    def make_test_function(self, force: bool = False) -> Any:
        """Keras' own, for the active adapters."""
        self._choose("test_function")
        return super().make_test_function(force=force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Keras' own, for the active adapters."""
        self._choose("predict_function")
        return super().make_predict_function(force=force)

    def _choose(self, attribute: str) -> None:
        self._adapter_state.functions.choose(self, attribute, self._adapter_state.active)
