"""LN tuning: gains and biases of normalisation layers are trained. Paper: arXiv:2312.11420."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.layers.norm import NORMALIZATION_LAYERS
from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.in_place import InPlaceMethod
from tfimm_lora.weights.names import NamedVariable, iterate_layers, timm_path


class LNTuning(InPlaceMethod):
    """Trains the normalisation layers that ``lora_targets`` name, or all of the model's."""

    name = "ln_tuning"
    takes_targets = True
    peft_type = "LN_TUNING"
    peft_tensors = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    @classmethod
    def check_model(cls, model: Any, fields: Any) -> None:
        """Raises unless every target is a normalisation layer of the model.

        Raises:
            ValueError: Says which is not.
        """
        modules = [
            timm_path(p) for p, la in iterate_layers(model) if isinstance(la, NORMALIZATION_LAYERS)
        ]
        if not modules:
            raise ValueError("lora_method='ln_tuning': the model has no normalisation layers.")
        for pattern in _patterns(fields) or ():
            if not any(_matches(pattern, m) for m in modules):
                ends = {re.sub(r"^(.*\.)?\d+\.", "", m) for m in modules}
                raise ValueError(
                    f"lora_targets: {pattern!r} matches no normalisation layer, which is what "
                    f"lora_method='ln_tuning' trains.{nearest_names(pattern, {*ends, *modules})} "
                    f"Normalisation layers end in: {', '.join(sorted(ends))}."
                )

    @classmethod
    def trains(cls, variable: NamedVariable, fields: Any) -> bool:
        """Weights of normalisation layers that are targeted."""
        if not isinstance(variable.layer, NORMALIZATION_LAYERS):
            return False
        patterns = _patterns(fields)
        return patterns is None or any(_matches(p, variable.module) for p in patterns)

    @classmethod
    def peft_key(cls, name: str) -> str:
        """``blocks.0.norm1.ln_tuning_layers.weight``."""
        module, _, leaf = name.rpartition(".")
        return f"{module}.ln_tuning_layers.{leaf}"

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """``LN_TUNING``."""
        return Method.matches_peft.__func__(cls, config)  # type: ignore[attr-defined]

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """PEFT's config has no more than the targets."""
        return {"peft_type": cls.peft_type}

    @classmethod
    def peft_targets(cls, modules: Sequence[str]) -> list[str] | str:
        """One regular expression: in a list, ``norm`` would mean every path that ends so."""
        return "|".join(re.escape(m) for m in modules)


def _patterns(fields: Any) -> list[str] | None:
    targets = fields.lora_targets
    if targets is None:
        return None
    return targets.split() if isinstance(targets, str) else list(targets)


def _matches(pattern: str, module: str) -> bool:
    # The targets know the layers, which know the methods.
    from tfimm_lora.weights.patterns import matches

    return matches(pattern, module)
