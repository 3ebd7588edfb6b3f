"""What makes a Keras layer an adapted one: operation x method x kernel, in a mixin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.config import check_quantize_merged
from tfimm_lora.lora.forward import by_site, forward, forward_rounded
from tfimm_lora.lora.layer_adapter import KERNEL_ARGUMENTS, LORA_ARGUMENTS, LayerAdapter
from tfimm_lora.lora.layer_files import SavesUpdates
from tfimm_lora.lora.operations import Operation
from tfimm_lora.lora.per_example_layer import call_layer
from tfimm_lora.lora.per_example_layer import current as per_example
from tfimm_lora.quantization.layer import unlocked


class _Table:
    """Holds dictionaries that Keras would track, and copy, as attributes of a layer."""

    def __init__(self) -> None:
        self.adapters: dict[str, LayerAdapter] = {}
        self.unmerged: Any = None


class LoRALayer(SavesUpdates):
    """Mixin that lets adapters change what a Keras layer with a kernel does.

    With an adapter the kernel is frozen, and what the method adds is trained. Adapters come and
    go by name; without one the layer is the Keras layer. See :class:`LoRADense` for the arguments.

    Attributes:
        is_lora_layer: Always ``True``.
        operation: How the layer uses its kernel.
        merged: Whether the active adapters are part of the kernel at the moment.
    """

    is_lora_layer = True
    operation: Operation

    # What the Keras layer behind this mixin brings.
    activation: Any
    dtype_policy: Any
    add_loss: Any
    # The arguments of the first adapter.
    lora_alpha: Any
    lora_dropout: float
    lora_init: Any
    lora_method: Any
    lora_options: Any
    lora_rank: Any
    lora_slices: Any
    lora_train_bias: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        first = {name: kwargs.pop(name, default) for name, default in LORA_ARGUMENTS.items()}
        others = kwargs.pop("lora_adapters", None) or {}
        active = kwargs.pop("lora_active", None)
        stored = {name: kwargs.pop(name, default) for name, default in KERNEL_ARGUMENTS.items()}
        super().__init__(*args, **kwargs)
        self.merged = False
        self._table = _Table()
        self._active: tuple[str, ...] = ()
        self._misfit = ""
        self._show_arguments(first)
        if first["lora_method"] is not None:
            self.add_adapter("default", **first)
        for name, arguments in others.items():
            self.add_adapter(name, **arguments)
        if active is not None:
            self.set_adapters(active)
        self.lora_quantize_merged = False
        self.store_kernel_as(**stored)

    def store_kernel_as(
        self,
        lora_quantization: str | None,
        lora_group_size: int | None = None,
        lora_quantize_merged: bool = False,
        fit: bool = False,
    ) -> None:
        """Stores the kernel in another format, in place.

        Args:
            lora_quantization: See :class:`LoRADense`.
            lora_group_size: See :class:`LoRADense`.
            lora_quantize_merged: See :class:`LoRADense`.
            fit: See :meth:`~tfimm_lora.quantization.StoresKernel.set_kernel_format`.

        Raises:
            ValueError: The format is unknown, the groups do not fit, or adapters are merged.
        """
        if self.merged:
            raise ValueError(f"{self.path}: unmerge the adapters before the kernel is quantised.")
        name, size = self.needed_format(lora_quantization, lora_group_size)
        check_quantize_merged(lora_quantize_merged, name)
        self.set_kernel_format(name, size, fit)
        self.lora_quantize_merged = lora_quantize_merged

    def needed_format(
        self, name: str | None, group_size: int | None
    ) -> tuple[str | None, int | None]:
        """Name of the format and group size as the methods of the adapters need them.

        Raises:
            ValueError: A method cannot work on such a kernel.
        """
        for adapter in self.adapters.values():
            options = self.lora_options or {}
            name, group_size = adapter.method.kernel_format(name, group_size, options)
        return name, group_size

    def kernel_to_quantize(
        self, value: np.ndarray, stored: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """What is stored of a float kernel: all of it, or what LoftQ's factors leave."""
        for update in self.updates:
            value = update.before_quantization(value, stored)
        return value

    def _show_arguments(self, arguments: dict[str, Any]) -> None:
        for name, value in arguments.items():
            setattr(self, name, value)

    @property
    def adapters(self) -> dict[str, LayerAdapter]:
        """The adapters of this layer by name, in the order in which they were added."""
        return self._table.adapters

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that act at the moment."""
        return self._active

    @property
    def updates(self) -> list[Any]:
        """Methods of the active adapters, one for each adapted slice."""
        return [update for name in self._active for update in self.adapters[name].updates]

    def add_adapter(self, name: str, **arguments: Any) -> None:
        """Adds an adapter; the first one is active at once.

        Args:
            name: Its name.
            **arguments: ``lora_`` arguments, see :class:`LoRADense`.

        Raises:
            ValueError: The name is taken, or an argument is unknown or out of range.
        """
        if name in self.adapters:
            raise ValueError(f"Layer {self.name!r} has an adapter {name!r} already.")
        adapter = LayerAdapter(name, arguments, self.dtype_policy)
        if not self.adapters:
            self._show_arguments(adapter.arguments)
        try:
            with unlocked(self._tracker):
                if adapter.dropout is not None:
                    # As an attribute Keras tracks it, with the state of its random numbers.
                    setattr(self, adapter.dropout.name, adapter.dropout)
                if self.built:
                    adapter.build(self)
        except Exception:
            self._forget(adapter)
            raise
        self.adapters[name] = adapter
        if len(self.adapters) == 1:
            self._active = (name,)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and its variables.

        Raises:
            ValueError: There is none of this name, or it is merged into the kernel.
        """
        if name not in self.adapters:
            raise ValueError(f"Layer {self.name!r} has no adapter {name!r}.")
        if self.merged and name in self._active:
            raise ValueError(f"{self.path}: {name!r} is merged into the kernel; unmerge it first.")
        adapter = self.adapters.pop(name)
        self._active = tuple(n for n in self._active if n != name)
        self._forget(adapter)

    def _forget(self, adapter: LayerAdapter) -> None:
        """Removes what an adapter that is not (or no longer) in the table has left."""
        for variable in adapter.variables:
            # Keras' delattr would collect garbage for every variable.
            vars(self).pop(variable.name, None)
            self._untrack_variable(variable)
        if adapter.dropout is not None and hasattr(self, adapter.dropout.name):
            with unlocked(self._tracker):
                # Keras' delattr leaves layers in the list of layers.
                self._tracker.untrack(adapter.dropout)
                delattr(self, adapter.dropout.name)
        rest = next(iter(self.adapters.values()), None)
        self._show_arguments(rest.arguments if rest else {**LORA_ARGUMENTS, "lora_method": None})

    def set_adapters(self, names: Iterable[str]) -> None:
        """Chooses which adapters act; names that this layer has not are left out.

        Raises:
            ValueError: Adapters are merged, or those chosen cannot act together.
        """
        if self.merged:
            raise ValueError(
                f"{self.path}: adapters are merged into the kernel; unmerge them first."
            )
        self.check_together(names)
        self._active = tuple(name for name in names if name in self.adapters)

    def check_together(self, names: Iterable[str]) -> None:
        """Raises if adapters cannot act at the same time; names that are not here are left out.

        Raises:
            ValueError: Says which.
        """
        found = [self.adapters[name] for name in names if name in self.adapters]
        kinds = {adapter.method.combines for adapter in found}
        if len(found) > 1 and (len(kinds) > 1 or None in kinds):
            who = ", ".join(f"{a.name} ({a.arguments['lora_method']})" for a in found)
            raise ValueError(
                f"{self.path}: the adapters {who} cannot act together. Activate one of them, or "
                "merge one first."
            )

    def build(self, input_shape: Any) -> None:
        """Builds the Keras layer, freezes its kernel and adds the adapters."""
        # Keras' own layers have an argument of this name, which must not come into play.
        rank, self.lora_rank = self.lora_rank, None
        super().build(tuple(input_shape))  # type: ignore[misc]
        self.lora_rank = rank
        for adapter in self.adapters.values():
            adapter.build(self)
        if self.adapters:
            self.kernel.trainable = False
            if self.bias is not None:
                self.bias.trainable = self.lora_train_bias != "none"

    @property
    def scaling(self) -> float:
        """Factor of the update (of the first one, if there are several); 0.0 without adapter."""
        return next((adapter.scaling for adapter in self.adapters.values()), 0.0)

    @property
    def lora_weights(self) -> list[Any]:
        """Variables of all adapters."""
        return [v for adapter in self.adapters.values() for v in adapter.variables]

    def lora_trainable_weights(self, train_bias: bool) -> list[Any]:
        """Variables to train: those of the adapters and, if wanted, the bias."""
        bias = [self.bias] if train_bias and self.bias is not None else []
        return [*self.lora_weights, *bias]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Applies kernel, active adapters, bias and activation.

        Raises:
            ValueError: The layer is trained while its adapters are merged.
        """
        if training and self.merged:
            raise ValueError(
                f"The LoRA weights of {self.path} are merged, so training would not reach them. "
                "Call lora.unmerge_lora_weights(model) first."
            )
        batch = per_example(self)
        if batch is not None:
            if self.lora_quantize_merged:
                raise ValueError(
                    f"{self.path}: with lora_quantize_merged every adapter has a rounded kernel of "
                    "its own, so examples cannot have adapters of their own. Serve them one after "
                    "the other."
                )
            return call_layer(batch, self, self.operation, inputs, self.activation)
        acting = [] if self.merged else [self.adapters[name] for name in self._active]
        if not acting and self.kernel_format is None:
            return super().call(inputs)  # type: ignore[misc]
        merges = self.lora_quantize_merged and acting
        kernel = ops.convert_to_tensor(self.kernel) if merges else self.kernel_tensor(inputs)
        parts = [(a.parts(kernel), a.dropped(inputs, training)) for a in acting]
        if training:
            for penalty in [p for a in acting for p in a.penalties()]:
                self.add_loss(penalty)
        outputs = (forward_rounded if merges else forward)(self, inputs, kernel, parts)
        if self.bias is not None:
            bias = ops.convert_to_tensor(self.bias)
            for found, _ in parts:
                bias = by_site(found, bias, self.operation.adapted_bias)
            outputs = self.operation.add_bias(self, outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self) -> dict[str, Any]:
        """The Keras layer's config and the arguments of all adapters."""
        config = {**super().get_config(), **LORA_ARGUMENTS, "lora_method": None}  # type: ignore[misc]
        others = {name: dict(a.arguments) for name, a in self.adapters.items()}
        config |= others.pop("default", {})
        config |= {**self._format_arguments, "lora_quantize_merged": self.lora_quantize_merged}
        return {**config, "lora_adapters": others, "lora_active": list(self._active)}


def is_adapted(layer: Any) -> bool:
    """Whether a layer has an adapter."""
    return isinstance(layer, LoRALayer) and bool(layer.adapters)
