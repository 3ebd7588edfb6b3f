"""What a layer with adapters or with a packed kernel writes into weights files, and reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.lora.layer_merging import MergesUpdates
from tfimm_lora.quantization.stored_kernel import StoredKernel


class SavesUpdates(MergesUpdates):
    """Mixin of layers with adapters: their weights in files, always in unmerged state."""

    _misfit: str

    @property
    def _is_plain(self) -> bool:
        return not self.adapters and not isinstance(self.kernel, StoredKernel)

    def save_own_variables(self, store: Any) -> None:
        """Writes all weights in their unmerged state (Keras would drop the adapters)."""
        if self._is_plain:
            super().save_own_variables(store)  # type: ignore[misc]
            return
        before = self._table.unmerged
        codes = {} if before is None else before.codes
        for name, value in codes.items():
            store[name] = value
        for variable in (*self.stored_variables(), *self.lora_weights):
            if variable.name not in codes and not (codes and variable is self.kernel):
                store[variable.name] = self.unmerged_value(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads what :meth:`save_own_variables` wrote; a packed kernel also from a float one.

        Raises:
            ValueError: A weight is missing or has another shape, for example because the file is
                that of a regular model.
        """
        found = set(store.keys())
        if not found and self._misfit:
            # Keras comes again, with nothing, to a layer that failed, and reports the last error.
            raise ValueError(self._misfit)
        self._misfit = ""
        packed = isinstance(self.kernel, StoredKernel)
        if "kernel_codes" in found and not packed and not self.merged:
            self._misfit = (
                f"{self.path}: the kernel in the file is packed ({', '.join(sorted(found))}), this "
                "model's is float. Create the model with the lora_quantization and lora_group_size "
                "of the one that was saved, or use lora.quantize on it before loading."
            )
            raise ValueError(self._misfit)
        if self._is_plain:
            super().load_own_variables(store)  # type: ignore[misc]
            return
        if self.merged:
            self._restore_format()
        wanted = [*self.stored_variables(), *self.lora_weights]
        if isinstance(self.kernel, StoredKernel) and "kernel" in found:
            wanted = [v for v in wanted if v.name not in self._kernel_names] + [self.kernel]
        names = {v.name: v.name for v in wanted}
        if isinstance(self.kernel, StoredKernel) and not self.adapters and "0" in found:
            # What Keras writes of a layer that is float and has no adapters.
            wanted = [self.kernel, *([] if self.bias is None else [self.bias])]
            names = {v.name: str(i) for i, v in enumerate(wanted)}
        for variable in wanted:
            if names[variable.name] not in found:
                raise ValueError(
                    f"{self.path}: the file has no {variable.name!r} (it has {sorted(found)}). It "
                    "was saved from a regular model or with another LoRA config; load it into such "
                    "a model, then use lora.convert_to_lora_model."
                )
            value = np.asarray(store[names[variable.name]])
            if tuple(value.shape) != tuple(variable.shape):
                self._misfit = (
                    f"{self.path}: {variable.name!r} has shape {tuple(value.shape)} in the file "
                    f"and {tuple(variable.shape)} in the model."
                )
                raise ValueError(self._misfit)
            variable.assign(value)

    @property
    def _kernel_names(self) -> set[str]:
        return {v.name for v in self.kernel.variables.values()}
