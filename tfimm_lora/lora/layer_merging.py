"""Making the active adapters of a layer part of its kernel, and taking them out again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.forward import additive, by_site, scaled
from tfimm_lora.lora.grouped_update import merge_into_zero_points
from tfimm_lora.quantization.layer import StoresKernel
from tfimm_lora.quantization.stored_kernel import StoredKernel
from tfimm_lora.weights.names import variable_value


@dataclasses.dataclass(frozen=True)
class _Unmerged:
    """What a layer was before its adapters were merged.

    Attributes:
        values: Values of the variables by name, with the kernel in float.
        codes: Values of the variables that hold a packed kernel.
        format: Name of the kernel's format.
        group_size: Its group size.
    """

    values: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    format: str | None
    group_size: int | None


class MergesUpdates(StoresKernel):
    """Mixin of layers with adapters: the adapted kernel, merging and unmerging.

    Attributes:
        merged: Whether the active adapters are part of the kernel at the moment.
    """

    merged: bool
    _active: tuple[str, ...]
    _table: Any

    # What the layer brings.
    adapters: Any
    bias: Any
    lora_quantize_merged: bool
    lora_weights: Any
    operation: Any
    path: str
    updates: Any

    def adapted_kernel(self) -> Any:
        """The kernel with all active adapters, whether they are merged or not."""
        kernel = self.kernel_tensor()
        if self.merged:
            return kernel
        if self.lora_quantize_merged:
            return self.fake_quantize(self.composed_kernel(ops.convert_to_tensor(self.kernel)))
        return self.composed_kernel(kernel)

    def composed_kernel(self, kernel: Any) -> Any:
        """A kernel with the updates of all active adapters."""
        acting = [self.adapters[name].parts(kernel) for name in self._active]
        for found in acting:
            kernel = scaled(self, kernel, found)
        terms = [term for found in acting if (term := additive(self, found)) is not None]
        return sum((ops.cast(term, kernel.dtype) for term in terms), start=kernel)

    def adapted_bias(self) -> Any:
        """The bias with all active adapters; ``None`` for a layer without bias."""
        if self.bias is None:
            return None
        bias, kernel = ops.convert_to_tensor(self.bias), self.kernel_tensor()
        for name in () if self.merged else self._active:
            found = self.adapters[name].parts(kernel)
            bias = by_site(found, bias, self.operation.adapted_bias)
        return bias

    def merge_weights(self, requantize: bool = False) -> bool:
        """Makes the active adapters part of kernel and bias.

        Their variables take values that add nothing, so that functions compiled before the merge
        stay right; what was there before is kept aside for :meth:`unmerge_weights`.

        Args:
            requantize: Keep the format of a quantised kernel: the merged kernel is rounded again,
                except for updates that its zero points can take up (QA-LoRA's). By default it is
                a float kernel as long as it is merged. Defaults to ``False``.

        Returns:
            Whether the merged kernel has been rounded, so that outputs change.

        Raises:
            ValueError: They are merged already.
        """
        if self.merged:
            raise ValueError(f"The LoRA weights of {self.path} have already been merged.")
        kernel, bias = self.adapted_kernel(), self.adapted_bias()
        if self.lora_quantize_merged:
            kernel, requantize = self.composed_kernel(ops.convert_to_tensor(self.kernel)), True
        neutral = [(u.variables[k], v) for u in self.updates for k, v in u.neutral().items()]
        codes = self.kernel.variables if isinstance(self.kernel, StoredKernel) else {}
        changed = [self.kernel, *([] if bias is None else [self.bias]), *(v for v, _ in neutral)]
        self._table.unmerged = _Unmerged(
            {v.name: variable_value(v) for v in changed},
            {v.name: variable_value(v) for v in codes.values()},
            None if self.kernel_format is None else self.kernel_format.name,
            self.group_size,
        )
        if not requantize:
            self.set_kernel_format(None)
        exact = requantize and merge_into_zero_points(self.kernel, self.updates)
        if not exact:
            self.kernel.assign(kernel)
        for variable, value in [*([] if bias is None else [(self.bias, bias)]), *neutral]:
            variable.assign(value)
        self.merged = True
        rounds = self.kernel_format is not None and not self.lora_quantize_merged
        return rounds and not exact

    def unmerge_weights(self) -> None:
        """Restores kernel, bias and adapters to the bit.

        Raises:
            ValueError: They are not merged.
        """
        if not self.merged:
            raise ValueError(f"The LoRA weights of {self.path} are not merged.")
        before = self._restore_format()
        for variable in (*self.stored_variables(), *self.lora_weights):
            value = before.codes.get(variable.name, before.values.get(variable.name))
            if value is not None:
                variable.assign(value)

    def _restore_format(self) -> _Unmerged:
        """Gives the layer the variables that it had before the merge, values aside."""
        before: _Unmerged = self._table.unmerged
        self.merged, self._table.unmerged = False, None
        if before.format is not None and self.kernel_format is None:
            self.set_kernel_format(before.format, before.group_size)
        return before

    def unmerged_value(self, variable: Any) -> np.ndarray:
        """The value that a variable of this layer has when nothing is merged."""
        before = self._table.unmerged
        value = None if before is None else before.values.get(variable.name)
        return variable_value(variable) if value is None else value

    @property
    def _format_arguments(self) -> dict[str, Any]:
        """The kernel's format as arguments of the layer, whether it is merged or not."""
        before, format = self._table.unmerged, self.kernel_format
        name = None if format is None else format.name
        size = self.group_size if self.built else self.kernel_group_size
        if before is not None:
            name, size = before.format, before.group_size
        return {"lora_quantization": name, "lora_group_size": size}
