"""Methods that train weights of the model itself and adapt no layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.update import Update

FOREIGN_TYPE = "TFIMM_LORA"
"""``peft_type`` of what PEFT has not, so that PEFT refuses the file instead of misreading it."""


class InPlaceMethod(Method):
    """Base class: no variables of its own, no update.

    Attributes:
        name: Name of the method in ``METHODS``, written into the adapter's config.
    """

    in_place = True
    takes_targets = False
    takes_dropout = False
    takes_slices = False
    combines = None
    name: str

    def build(self) -> None:
        """Nothing."""

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """Nothing."""
        return Update()

    def neutral(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """By the method's name."""
        if cls.peft_type is not None:
            return super().matches_peft(config)
        return config.get("peft_type") == FOREIGN_TYPE and config.get("method") == cls.name

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """No fields of its own."""
        return {}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """A type that PEFT does not know, and the method's name."""
        return {"method": cls.name, "peft_type": FOREIGN_TYPE}
