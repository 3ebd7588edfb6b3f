"""What LoHa and LoKr share: PEFT's shapes, its initial values, and kernels of low Tucker rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import Method


class Lycoris(Method):
    """A method whose variables have PEFT's names and PEFT's shapes."""

    initializations: ClassVar[tuple[str, ...]] = ("kaiming_uniform",)

    def add_uniform(self, name: str, shape: tuple[int, ...]) -> None:
        """Creates a variable with PEFT's values: uniform, +-1 / sqrt(all axes but the first)."""
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.add_weight(name, shape, keras.initializers.RandomUniform(-bound, bound))

    @property
    def spatial(self) -> tuple[int, ...]:
        """Height and width of a convolution's kernel; empty for other layers."""
        return self.layer.operation.spatial(self.layer)

    @property
    def channels(self) -> int:
        """Inputs of one output at one place of the kernel."""
        rows, _ = self.layer.operation.kernel_sides(self.layer)
        return rows // math.prod(self.spatial)

    @property
    def effective(self) -> bool:
        """Whether the kernel's height and width have a core tensor of their own."""
        return self.options.use_effective_conv2d and math.prod(self.spatial) > 1

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, alpha and the options that are not PEFT's defaults."""
        options = {k: v for k, v in vars(cls.Options()).items() if config.get(k, v) != v}
        return {
            "lora_rank": config.get("r", 8),
            "lora_alpha": config.get("alpha", 8),
            "lora_options": {name: config[name] for name in options},
        }

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's config."""
        return {
            "alpha": fields.lora_rank if fields.lora_alpha is None else fields.lora_alpha,
            "init_weights": True,
            "module_dropout": 0.0,
            "r": fields.lora_rank,
            "rank_dropout": 0.0,
            **vars(cls.Options(**fields.lora_options)),
        }

    def to_peft(self) -> dict[str, np.ndarray]:
        """The variables as they are."""
        return self.numpy_values()

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors as they are."""
        return {name: tensors[name] for name in self.variables}


def tucker_rows(core: Any, factor: Any) -> Any:
    """Multiplies a core (r, r, h, w) with the inputs' factor (r, inputs): (r, inputs * h * w)."""
    rows = ops.einsum("ijhw,jn->inhw", core, factor)
    return ops.reshape(rows, (rows.shape[0], -1))
