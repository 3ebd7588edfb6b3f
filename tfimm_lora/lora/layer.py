"""What makes a Keras layer an adapted one: operation x method, in a mixin."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.layers import Dropout
from tfimm_lora.lora.config import check_rank
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.base import Method, Site
from tfimm_lora.lora.operations import Operation
from tfimm_lora.weights.names import variable_value

LORA_ARGUMENTS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": None,
    "lora_method": "lora",
    "lora_dropout": 0.0,
    "lora_init": None,
    "lora_train_bias": "none",
    "lora_slices": None,
}


class LoRALayer:
    """Mixin that adds an update to a Keras layer with a kernel.

    The kernel is frozen; what the method adds is trained. See :class:`LoRADense` for the
    arguments.

    Attributes:
        is_lora_layer: Always ``True``.
        operation: How the layer uses its kernel.
        updates: One method instance per adapted slice (one for the whole kernel).
        merged: Whether the updates are part of the kernel at the moment.
    """

    is_lora_layer = True
    operation: Operation

    # What the Keras layer behind this mixin brings.
    activation: Any
    bias: Any
    kernel: Any
    compute_dtype: str
    dtype_policy: Any
    path: str
    lora_alpha: Any
    lora_dropout: float
    lora_init: Any
    lora_method: str
    lora_rank: Any
    lora_slices: Any
    lora_train_bias: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = {name: kwargs.pop(name, default) for name, default in LORA_ARGUMENTS.items()}
        super().__init__(*args, **kwargs)
        check_rank("lora_rank", fields["lora_rank"])
        if fields["lora_method"] not in METHODS:
            raise ValueError(
                f"Unknown lora_method {fields['lora_method']!r}. Use one of {', '.join(METHODS)}."
            )
        for name, value in fields.items():
            setattr(self, name, value)
        self.merged = False
        self.updates: list[Method] = []
        self._unmerged: dict[str, np.ndarray] = {}
        self._misfit = ""
        rate = self.lora_dropout
        self.lora_dropout_layer = (
            Dropout(rate, name="lora_dropout", dtype=self.dtype_policy) if rate else None
        )

    def build(self, input_shape: Any) -> None:
        """Builds the Keras layer, freezes its kernel and adds the updates."""
        # Keras' own layers have an argument of this name, which must not come into play.
        rank, self.lora_rank = self.lora_rank, None
        super().build(tuple(input_shape))  # type: ignore[misc]
        self.lora_rank = rank
        self.kernel.trainable = False
        if self.bias is not None:
            self.bias.trainable = self.lora_train_bias != "none"
        method = METHODS[self.lora_method]
        for site in self._sites():
            self._warn_if_large(site)
            update = method(self, site)
            update.build()
            self.updates.append(update)

    def _sites(self) -> list[Site]:
        outputs = self.operation.outputs(self)
        if not self.lora_slices:
            alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
            return [Site("", 0, outputs, self.lora_rank, alpha)]
        sites = []
        for name, facts in self.lora_slices.items():
            size = outputs // facts["of"]
            rank = facts.get("rank") or self.lora_rank
            alpha = facts.get("alpha") or self.lora_alpha or rank
            sites.append(Site(name, facts["index"] * size, size, rank, alpha))
        return sorted(sites, key=lambda site: site.start)

    def _warn_if_large(self, site: Site) -> None:
        rows, columns = self.operation.kernel_sides(self)
        columns = columns * site.size // self.operation.outputs(self)
        if site.rank > min(rows, columns):
            where = self.path + (f" ({site.name})" if site.name else "")
            warnings.warn(
                f"{where}: rank {site.rank} is larger than the smaller side of its kernel "
                f"({rows} x {columns}), so the update is not of low rank: it has "
                f"{site.rank * (rows + columns):,} weights where the kernel has "
                f"{rows * columns:,}.",
                stacklevel=2,
            )

    @property
    def scaling(self) -> float:
        """Factor of the update (of the first one, if there are several)."""
        if self.updates:
            return self.updates[0].scaling
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return METHODS[self.lora_method](self, Site("", 0, 0, self.lora_rank, alpha)).scaling

    @property
    def lora_weights(self) -> list[Any]:
        """Variables of the updates."""
        return [w for update in self.updates for w in update.weights]

    def lora_trainable_weights(self, train_bias: bool) -> list[Any]:
        """Variables to train: those of the updates and, if wanted, the bias."""
        bias = [self.bias] if train_bias and self.bias is not None else []
        return [*self.lora_weights, *bias]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Applies kernel, updates, bias and activation.

        Raises:
            ValueError: The layer is trained while its updates are merged.
        """
        if training and self.merged:
            raise ValueError(
                f"The LoRA weights of {self.path} are merged, so training would not reach them. "
                "Call lora.unmerge_lora_weights(model) first."
            )
        kernel, adapt = self.kernel, not self.merged
        dropped = inputs
        if adapt and self.lora_dropout_layer is not None:
            dropped = self.lora_dropout_layer(inputs, training=training)
        compose = adapt and self.operation.composed
        # In 16 bits a small update would be lost in the sum with the kernel.
        in_kernel = compose and dropped is inputs and self.compute_dtype == "float32"
        if in_kernel:
            kernel = self.adapted_kernel()
        outputs = self.operation.apply_kernel(self, inputs, kernel)
        if compose and not in_kernel:
            update = ops.cast(self.kernel_update(), inputs.dtype)
            outputs = outputs + self.operation.apply_kernel(self, dropped, update)
        elif adapt and not compose:
            outputs = self._apply_updates(dropped, outputs)
        outputs = self.operation.add_bias(self, outputs)
        return outputs if self.activation is None else self.activation(outputs)

    def _apply_updates(self, inputs: Any, outputs: Any) -> Any:
        if not self.lora_slices:
            return self.updates[0].apply(inputs, outputs)
        parts, end = [], 0
        for update in self.updates:
            start = update.site.start
            if start > end:
                parts.append(outputs[..., end:start])
            end = start + update.site.size
            parts.append(update.apply(inputs, outputs[..., start:end]))
        if end < outputs.shape[-1]:
            parts.append(outputs[..., end:])
        return ops.concatenate(parts, axis=-1)

    def adapted_kernel(self) -> Any:
        """The kernel with all updates added, whether they are merged or not."""
        kernel = ops.convert_to_tensor(self.kernel)
        if self.merged:
            return kernel
        return kernel + ops.cast(self.kernel_update(), kernel.dtype)

    def kernel_update(self) -> Any:
        """The sum of all updates in the kernel's shape."""
        if not self.lora_slices:
            return self.updates[0].delta()
        outputs = self.kernel.shape[-1]
        padded = []
        for update in self.updates:
            site, delta = update.site, update.delta()
            pad = [(0, 0)] * (len(delta.shape) - 1)
            padded.append(ops.pad(delta, [*pad, (site.start, outputs - site.start - site.size)]))
        return sum(padded[1:], start=padded[0])

    def merge_weights(self) -> None:
        """Adds the updates to the kernel.

        The variables of the updates take values that add nothing, so that functions compiled
        before the merge stay right; kernel and updates are kept aside for :meth:`unmerge_weights`.

        Raises:
            ValueError: They are merged already.
        """
        if self.merged:
            raise ValueError(f"The LoRA weights of {self.path} have already been merged.")
        merged = self.adapted_kernel()
        neutral = {k: v for update in self.updates for k, v in update.neutral().items()}
        variables = {v.name: v for v in [self.kernel, *self.lora_weights]}
        self._unmerged = {name: variable_value(variables[name]) for name in ("kernel", *neutral)}
        self.kernel.assign(merged)
        for name, value in neutral.items():
            variables[name].assign(value)
        self.merged = True

    def unmerge_weights(self) -> None:
        """Restores kernel and updates to the bit.

        Raises:
            ValueError: They are not merged.
        """
        if not self.merged:
            raise ValueError(f"The LoRA weights of {self.path} are not merged.")
        for variable in [self.kernel, *self.lora_weights]:
            if variable.name in self._unmerged:
                variable.assign(self._unmerged[variable.name])
        self._unmerged = {}
        self.merged = False

    def unmerged_value(self, variable: Any) -> np.ndarray:
        """The value that a variable of this layer has when nothing is merged."""
        if variable.name in self._unmerged:
            return self._unmerged[variable.name]
        return variable_value(variable)

    def _own(self) -> list[Any]:
        bias = [] if self.bias is None else [self.bias]
        return [self.kernel, *bias, *self.lora_weights]

    def save_own_variables(self, store: Any) -> None:
        """Writes all weights in their unmerged state (Keras would drop the updates)."""
        for variable in self._own():
            store[variable.name] = self.unmerged_value(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads what :meth:`save_own_variables` wrote.

        Raises:
            ValueError: A weight is missing or has another shape, for example because the file is
                that of a regular model.
        """
        found = set(store.keys())
        if not found and self._misfit:
            # Keras comes again, with nothing, to a layer that failed, and reports the last error.
            raise ValueError(self._misfit)
        self._misfit = ""
        for variable in self._own():
            if variable.name not in found:
                raise ValueError(
                    f"{self.path}: the file has no {variable.name!r} (it has {sorted(found)}). It "
                    "was saved from a regular model or with another LoRA config; load it into such "
                    "a model, then use lora.convert_to_lora_model."
                )
            value = np.asarray(store[variable.name])
            if tuple(value.shape) != tuple(variable.shape):
                self._misfit = (
                    f"{self.path}: {variable.name!r} has shape {tuple(value.shape)} in the file "
                    f"and {tuple(variable.shape)} in the model."
                )
                raise ValueError(self._misfit)
            variable.assign(value)
        self.merged, self._unmerged = False, {}

    def get_config(self) -> dict[str, Any]:
        """The Keras layer's config and all ``lora_`` arguments."""
        config = super().get_config()  # type: ignore[misc]
        return {**config, **{name: getattr(self, name) for name in LORA_ARGUMENTS}}
