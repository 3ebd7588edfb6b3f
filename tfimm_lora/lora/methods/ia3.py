"""IA3: gains on the outputs or on the inputs of a layer. Paper: arXiv:2205.05638."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class IA3Options:
    """Options of IA3.

    Attributes:
        feedforward: Which of the adapted layers have their inputs scaled instead of their outputs
            (PEFT's ``feedforward_modules``): a pattern or several as in ``lora_targets``; in a
            single layer ``True`` or ``False``. Defaults to none.
    """

    feedforward: Any = ()

    def __post_init__(self) -> None:
        value = self.feedforward
        if isinstance(value, (bool, str)):
            return
        if not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
            raise ValueError(
                "feedforward has to be names of layers, such as ('mlp.fc2',), or True or False, "
                f"found {value!r}."
            )

    @property
    def patterns(self) -> list[str]:
        """The patterns, in a model's options."""
        if isinstance(self.feedforward, bool):
            return ["*"] if self.feedforward else []
        return (
            self.feedforward.split() if isinstance(self.feedforward, str) else [*self.feedforward]
        )


class IA3(Method):
    """Multiplies every output, its bias included, or every input with a learned gain."""

    Options = IA3Options
    combines = "product"
    takes_dropout = False
    peft_type = "IA3"
    peft_tensors = ("ia3_l",)

    @classmethod
    def options_by_layer(
        cls, options: Mapping[str, Any], modules: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Says of every layer whether its inputs are scaled.

        Raises:
            ValueError: A pattern matches none of the layers.
        """
        from tfimm_lora.weights.patterns import matches

        patterns = cls.Options(**options).patterns
        for pattern in patterns:
            if not any(matches(pattern, m) for m in modules):
                raise ValueError(
                    f"lora_options: feedforward={pattern!r} matches none of the adapted layers "
                    f"({', '.join(modules)})."
                )
        return {
            m: {**options, "feedforward": any(matches(p, m) for p in patterns)} for m in modules
        }

    @property
    def scales_inputs(self) -> bool:
        """Whether the inputs are scaled, not the outputs."""
        return bool(self.options.feedforward)

    def build(self) -> None:
        """Creates ``ia3_l``, ones.

        Raises:
            ValueError: The inputs of a slice are to be scaled, or the bias has not one value for
                each output.
        """
        operation = self.layer.operation
        if self.scales_inputs and self.site.name:
            raise ValueError(
                f"Layer {self.layer.name!r}: all slices of its outputs read the same inputs, so "
                f"those of {self.site.name!r} cannot be scaled alone. Adapt the whole layer."
            )
        size = operation.inputs(self.layer) if self.scales_inputs else self.site.size
        if not self.scales_inputs and self.layer.bias is not None and not self.site.name:
            operation.bias_gain(self.layer, np.ones(size, "float32"))
        self.add_weight("ia3_l", (size,), "ones")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """A gain of the inputs, or of outputs and bias."""
        gain = values["ia3_l"]
        if self.scales_inputs:
            return Update(input_gain=gain)
        whole = self.layer.bias is not None and not self.site.name
        return Update(
            gain=gain,
            bias_gain=self.layer.operation.bias_gain(self.layer, gain) if whole else gain,
        )

    def neutral(self) -> dict[str, np.ndarray]:
        """Ones."""
        return {"ia3_l": np.ones(self.variables["ia3_l"].shape, "float32")}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The layers whose inputs are scaled.

        In PEFT a string is a regular expression for the whole path, a list has ends of paths, which
        need not begin at a dot.
        """
        found = config.get("feedforward_modules") or []
        if not isinstance(found, str):
            found = "|".join(f".*{re.escape(end)}" for end in sorted(found))
        return {"lora_options": {"feedforward": [f"(?:{found})"]} if found else {}}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``IA3Config``."""
        return {"fan_in_fan_out": False, "feedforward_modules": [], "init_ia3_weights": True}

    @classmethod
    def peft_modules_config(
        cls, fields: Any, updates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """The layers whose inputs are scaled."""
        modules = [m for m, found in updates.items() if found[0].scales_inputs]
        # As a regular expression: a list's items would match without a dot in front of them.
        return {"feedforward_modules": "|".join(map(re.escape, modules)) if modules else []}

    def to_peft(self) -> dict[str, np.ndarray]:
        """``ia3_l``: (out, 1) or (1, in), for convolutions (1, n, 1, 1)."""
        value = self.numpy_values()["ia3_l"]
        if _is_convolution(self.layer):
            return {"ia3_l": value[None, :, None, None]}
        return {"ia3_l": value[None] if self.scales_inputs else value[:, None]}

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensor."""
        return {"ia3_l": tensors["ia3_l"].reshape(-1)}

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float]:
        """One gain for all outputs, which is 1 outside the slices."""
        layer = updates[0].layer
        gain = np.ones(layer.operation.outputs(layer), "float32")
        for update in updates:
            gain[_slice(update)] = update.numpy_values()["ia3_l"]
        return {"ia3_l": gain[:, None]}, updates[0].site.rank, updates[0].site.alpha

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """From the packed gain.

        Raises:
            ValueError: Other outputs have a gain.
        """
        gain = tensors["ia3_l"].reshape(-1).copy()
        values = [{"ia3_l": gain[_slice(update)].copy()} for update in updates]
        for update in updates:
            gain[_slice(update)] = 1
        if np.any(gain != 1):
            raise ValueError("The adapter is not one of the slices of this layer.")
        return values


def _slice(update: Any) -> slice:
    return slice(update.site.start, update.site.start + update.site.size)


def _is_convolution(layer: Any) -> bool:
    return isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D))
