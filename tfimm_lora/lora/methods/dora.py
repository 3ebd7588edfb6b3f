"""DoRA: W + (alpha / r) A B with columns of trained norms. Paper: arXiv:2402.09353."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import NoOptions, Site, kernel_value
from tfimm_lora.lora.methods.lora import LoRA
from tfimm_lora.lora.peft.targets import pattern_value
from tfimm_lora.lora.update import Update

# Squares, or parts of squares, that are smaller are rounding.
_SMALLEST = 1e-12


class DoRA(LoRA):
    """LoRA whose columns are brought to trained norms.

    With ``V = W + s A B`` and ``n`` the norms of V's columns, the kernel is ``V m / n``. The
    magnitude m is trained as its difference to the norms of W, so it starts at zero whatever the
    weights are. As in the paper, n counts as a constant when gradients are formed.
    """

    Options: ClassVar[type] = NoOptions
    combines = None
    initializations = ("kaiming_uniform", "gaussian")
    peft_tensors = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")

    def build(self) -> None:
        """Creates LoRA's factors and ``lora_magnitude_vector``."""
        super().build()
        self.add_weight("lora_magnitude_vector", (self.site.size,), "zeros")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The gain m / n on the outputs, and LoRA's factors, B with the gain."""
        factors = super().update(kernel, values)
        square, added = self._squared_norms(kernel, factors)
        # A column of zeros has no norm to compare with; its magnitude is the difference itself.
        known = square > 0
        unit = ops.where(known, square, ops.maximum(added, _SMALLEST))
        start = ops.cast(known, "float32") + values["lora_magnitude_vector"] / ops.sqrt(unit)
        # Exactly 1 without update: what compilers make of 1 / sqrt(1) is not.
        changed = ops.logical_and(known, ops.not_equal(added, 0.0))
        shrunk = ops.rsqrt(ops.maximum(1.0 + added / unit, _SMALLEST))
        gain = start * ops.where(changed, shrunk, 1.0)
        tangent = None
        if not self.layer.operation.composed:
            constant = ops.stop_gradient(gain)
            tangent = (gain - constant) / ops.where(ops.equal(constant, 0.0), 1.0, constant)
            gain = constant
        b = factors.b * ops.reshape(gain, factors.b.shape[1:])
        return dataclasses.replace(factors, b=b, gain=gain, gain_tangent=tangent)

    def _squared_norms(self, kernel: Any, factors: Update) -> tuple[Any, Any]:
        """Squared norms of W's columns, and what the update adds to them."""
        layer, op = self.layer, self.layer.operation
        matrix = ops.stop_gradient(ops.cast(op.to_matrix(layer, kernel), "float32"))
        a, b = ops.stop_gradient(factors.a), ops.stop_gradient(factors.b)
        square = ops.sum(ops.square(matrix), axis=0)
        if getattr(layer, "groups", 1) > 1:
            dense = op.to_matrix(layer, op.product(layer, a, b))
            return square, ops.sum(dense * (2.0 * matrix + dense), axis=0)
        # |w + A b|^2 = |w|^2 + 2 (A'w) b + b' (A'A) b: thin products, no A B.
        a, b = op.factor_matrices(layer, a, b)
        left = ops.transpose(a)
        mixed = 2.0 * ops.matmul(left, matrix) + ops.matmul(ops.matmul(left, a), b)
        return square, ops.sum(mixed * b, axis=0)

    def neutral(self) -> dict[str, np.ndarray]:
        """B = 0 and the norms of the kernel."""
        difference = np.zeros((self.site.size,), "float32")
        return {**super().neutral(), "lora_magnitude_vector": difference}

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """LORA with ``use_dora``, with or without ``use_rslora``."""
        of_type = config.get("peft_type") == cls.peft_type
        return of_type and bool(config.get("use_dora")) and not config.get("use_qalora")

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """LoRA's; with ``use_rslora`` the alpha that gives that scaling here, alpha sqrt(r)."""
        fields = super().fields_from_peft(config)
        if config.get("use_rslora"):
            fields["lora_alpha"] *= math.sqrt(fields["lora_rank"])
        return fields

    @classmethod
    def peft_alpha(cls, config: Mapping[str, Any], module: str) -> float | None:
        """With ``use_rslora`` alpha sqrt(r), of the module's own alpha and r."""
        if not config.get("use_rslora"):
            return None
        rank = pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        return alpha * math.sqrt(rank)

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """LoRA's, with ``use_dora``."""
        return {**super().peft_config(fields), "use_dora": True}

    def to_peft(self) -> dict[str, np.ndarray]:
        """LoRA's tensors and ``lora_magnitude_vector``, the magnitude itself."""
        magnitude = _norms(self.layer, self.site) + self.numpy_values()["lora_magnitude_vector"]
        return {
            **super().to_peft(),
            "lora_magnitude_vector": _in_peft_shape(self.layer, magnitude),
        }

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors."""
        values = super().from_peft(tensors)
        if "lora_magnitude_vector" in tensors:
            values |= self._difference(tensors["lora_magnitude_vector"])
        return values

    def _difference(self, magnitude: np.ndarray) -> dict[str, np.ndarray]:
        norms = _norms(self.layer, self.site)
        if magnitude.size != norms.size:
            raise ValueError(
                f"{self.layer.path}: lora_magnitude_vector has {magnitude.size} values in the "
                f"adapter, and the model has {norms.size} outputs."
            )
        return {"lora_magnitude_vector": magnitude.reshape(-1) - norms}

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float]:
        """As LoRA; the magnitudes of outputs that no slice has are the norms of W."""
        tensors, rank, alpha = super().pack(updates)
        layer = updates[0].layer
        magnitude = _norms(layer, None)
        for update in updates:
            magnitude[_outputs(update)] = update.to_peft()["lora_magnitude_vector"].reshape(-1)
        tensors["lora_magnitude_vector"] = _in_peft_shape(layer, magnitude)
        return tensors, rank, alpha

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """From the packed adapter.

        Raises:
            ValueError: Ranks differ, or other outputs are changed.
        """
        values = super().unpack(updates, tensors)
        magnitude = tensors["lora_magnitude_vector"].reshape(-1)
        rest = magnitude - _norms(updates[0].layer, None)
        for update, own in zip(updates, values, strict=True):
            own |= update._difference(magnitude[_outputs(update)])
            rest[_outputs(update)] = 0
        if np.any(np.abs(rest) > 1e-5 * np.abs(magnitude)):
            raise ValueError("The adapter changes magnitudes outside the slices of this layer.")
        return values


def _outputs(update: Any) -> slice:
    return slice(update.site.start, update.site.start + update.site.size)


def _norms(layer: Any, site: Site | None) -> np.ndarray:
    """Norms of the columns of the frozen kernel, or of a slice of it."""
    kernel = kernel_value(layer, site or Site("", 0, 0, 1, 1.0))
    matrix = ops.convert_to_numpy(layer.operation.to_matrix(layer, kernel))
    return np.linalg.norm(np.asarray(matrix, "float64"), axis=0).astype("float32")


def _in_peft_shape(layer: Any, magnitude: np.ndarray) -> np.ndarray:
    """(out,), and (1, out, 1, 1) for a convolution."""
    return magnitude.reshape(1, -1, 1, 1) if layer.operation.spatial(layer) else magnitude
