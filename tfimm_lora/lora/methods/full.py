"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.lora.methods.in_place import InPlaceMethod
from tfimm_lora.quantization.registry import kernel_format
from tfimm_lora.weights.names import NamedVariable


class Full(InPlaceMethod):
    """Trains everything. No copy of the base model is kept, so it cannot be switched off."""

    name = "full"
    keeps_base = False

    @classmethod
    def kernel_format(
        cls, name: str | None, group_size: int | None, options: Mapping[str, Any]
    ) -> tuple[str | None, int | None]:
        """Float, or a fake format: then the kernels learn to be quantised.

        Raises:
            ValueError: The format is a packed one, whose kernels cannot be trained.
        """
        format = kernel_format(name)
        if format is not None and format.packed:
            raise ValueError(
                f"lora_quantization={name!r}: {cls.name} trains all kernels, and packed ones have "
                "no gradient. Use a fake format, such as 'fake-int8' (quantisation-aware "
                "training), or another method."
            )
        return name, group_size

    @classmethod
    def trains(cls, variable: NamedVariable, fields: Any) -> bool:
        """Every weight that an optimizer may change."""
        return True
