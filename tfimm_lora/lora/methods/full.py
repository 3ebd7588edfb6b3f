"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import Any

from tfimm_lora.lora.methods.in_place import InPlaceMethod
from tfimm_lora.weights.names import NamedVariable


class Full(InPlaceMethod):
    """Trains everything. No copy of the base model is kept, so it cannot be switched off."""

    name = "full"
    keeps_base = False

    @classmethod
    def trains(cls, variable: NamedVariable, fields: Any) -> bool:
        """Every weight that an optimizer may change."""
        return True
