"""BitFit: the biases are trained. Paper: arXiv:2106.10199."""

from __future__ import annotations

from typing import Any

from tfimm_lora.lora.methods.in_place import InPlaceMethod
from tfimm_lora.weights.names import NamedVariable


class BitFit(InPlaceMethod):
    """Trains every bias, those of normalisation layers included (PEFT's ``bias="all"``)."""

    name = "bitfit"

    @classmethod
    def trains(cls, variable: NamedVariable, fields: Any) -> bool:
        """Weights that timm calls ``bias``."""
        return variable.name.rpartition(".")[2] == "bias"
