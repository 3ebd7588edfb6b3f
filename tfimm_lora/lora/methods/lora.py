"""LoRA: W + (alpha / r) A B. Paper: arXiv:2106.09685."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.initialization import INITIALIZATIONS


class LoRA(Method):
    """Adds the product of two thin factors, applied as ``(x A) B``.

    The factored form keeps autodiff from forming a gradient of the size of the kernel.
    """

    def build(self) -> None:
        """Creates ``kernel_lora_a`` and ``kernel_lora_b`` (with ``_q`` and so on for slices)."""
        layer, site = self.layer, self.site
        a_shape, b_shape = layer.operation.factor_shapes(layer, site.rank, site.size)
        suffix = f"_{site.name}" if site.name else ""
        initial = INITIALIZATIONS[layer.lora_init or "kaiming_uniform"](site.rank)
        self.a = layer.add_weight(name=f"kernel_lora_a{suffix}", shape=a_shape, initializer=initial)
        self.b = layer.add_weight(name=f"kernel_lora_b{suffix}", shape=b_shape, initializer="zeros")
        # tfimm's layers have the factors as attributes of these names.
        setattr(layer, self.a.name, self.a)
        setattr(layer, self.b.name, self.b)

    @property
    def weights(self) -> list[Any]:
        """A and B."""
        return [self.a, self.b]

    @property
    def scaling(self) -> float:
        """The factor alpha / r."""
        return self.site.alpha / self.site.rank

    def apply(self, inputs: Any, outputs: Any) -> Any:
        """Adds the scaled low-rank product to the outputs."""
        operation = self.layer.operation
        low = operation.down(self.layer, inputs, ops.cast(self.a, inputs.dtype))
        # The scale goes onto the thin product, which is the smallest tensor at hand.
        up = operation.up(self.layer, low * self.scaling, ops.cast(self.b, inputs.dtype))
        return outputs + up

    def delta(self) -> Any:
        """The scaled product A B in the kernel's shape."""
        return self.layer.operation.product(self.layer, self.a, self.b) * self.scaling

    def neutral(self) -> dict[str, Any]:
        """B = 0."""
        return {self.b.name: np.zeros(self.b.shape, "float32")}
