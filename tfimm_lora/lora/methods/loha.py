"""LoHa: W + (alpha / r) (A1 B1) * (A2 B2), entry by entry. Paper: arXiv:2108.06098 (FedPara)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.lora import packed_blocks
from tfimm_lora.lora.methods.lycoris import Lycoris, tucker_rows
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class LoHaOptions:
    """Options of LoHa.

    Attributes:
        use_effective_conv2d: Whether kernels larger than 1 x 1 are taken apart with a core for
            their height and width (``hada_t1``, ``hada_t2``) instead of being flattened. Defaults
            to ``False``.
    """

    use_effective_conv2d: bool = False


class LoHa(Lycoris):
    """Adds the product, entry by entry, of two products of thin factors.

    Two factors of rank r make a rank of up to r^2. The entrywise product of ``B1 A1`` and
    ``B2 A2`` is the ordinary product of r^2 columns (those of B1 times those of B2) with r^2 rows,
    so that it need not be formed where r^2 is small.
    """

    Options = LoHaOptions
    scaled = ("hada_w2_b",)
    peft_type = "LOHA"
    peft_tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def build(self) -> None:
        """Creates ``hada_w1_a`` (out, r), ``hada_w1_b`` (r, in), the second pair and the cores."""
        rank, outputs = self.site.rank, self.site.size
        rows, _ = self.layer.operation.kernel_sides(self.layer)
        for i in "12":
            if self.effective:
                self.add_uniform(f"hada_t{i}", (rank, rank, *self.spatial))
                shapes: tuple[Any, Any] = ((rank, outputs), (rank, self.channels))
            else:
                shapes = ((outputs, rank), (rank, rows))
            self.add_uniform(f"hada_w{i}_a", shapes[0])
            if i == "1":
                self.add_uniform(f"hada_w{i}_b", shapes[1])
            else:
                self.add_weight(f"hada_w{i}_b", shapes[1], "zeros")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """Factors of rank r^2, or the whole update where that is less work."""
        layer, op = self.layer, self.layer.operation
        (left, right), (left2, right2) = (self._pair(values, i) for i in "12")
        if not self._as_factors():
            whole = ops.matmul(left, right) * ops.matmul(left2, right2) * self.scaling
            return Update(delta=op.from_matrix(layer, whole))
        rows, columns, rank = left.shape[0], right.shape[1], self.site.rank**2
        a = ops.reshape(left[:, :, None] * left2[:, None, :], (rows, rank))
        b = ops.reshape(right[:, None, :] * right2[None, :, :], (rank, columns))
        a, b = op.factors(layer, a, b * self.scaling)
        return Update(a=a, b=b)

    def _pair(self, values: Mapping[str, Any], i: str) -> tuple[Any, Any]:
        """One of the two products as (rows, r) and (r, outputs)."""
        a, b = values[f"hada_w{i}_a"], values[f"hada_w{i}_b"]
        if self.effective:
            return ops.transpose(tucker_rows(values[f"hada_t{i}"], b)), a
        return ops.transpose(b), ops.transpose(a)

    def _as_factors(self) -> bool:
        """Whether the factors of rank r^2 are less work than the update as a kernel."""
        layer, op = self.layer, self.layer.operation
        if op.composed or getattr(layer, "groups", 1) > 1:
            return False
        rows, columns = op.kernel_sides(layer)[0], self.site.size
        # Per token. Factors: forward, and backward to inputs and to themselves. A kernel: backward
        # to itself, as it is added to W before that is applied, unless the two stay apart.
        factors = 3 * self.site.rank**2 * (rows + columns)
        return factors < rows * columns * (3 if self._stays_apart() else 1)

    def _stays_apart(self) -> bool:
        adapter = self.layer.adapters.get(self.adapter)
        dropout = adapter is not None and adapter.dropout is not None
        return dropout or self.layer.compute_dtype != "float32"

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The inner axes of all products."""
        of_a, of_t = (0,) if self.effective else (1,), (0, 1)
        return {f"hada_{n}": a for i in "12" for n, a in (
            (f"w{i}_a", of_a), (f"w{i}_b", (0,)), (f"t{i}", of_t)
        )}  # fmt: skip

    def neutral(self) -> dict[str, np.ndarray]:
        """One factor zero, as at the start."""
        return {"hada_w2_b": np.zeros(self.variables["hada_w2_b"].shape, "float32")}

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float]:
        """One adapter of the summed rank; both of its factors have the slices' blocks."""
        layer, scaling = updates[0].layer, updates[0].scaling
        outputs, rank = layer.operation.outputs(layer), sum(u.site.rank for u in updates)
        parts = [update.to_peft() for update in updates]
        tensors = {}
        for i in "12":
            a = np.zeros((outputs, rank), "float32")
            for (rows, columns), update, part in zip(
                packed_blocks(updates), updates, parts, strict=True
            ):
                # One scale serves the whole layer, so a slice with another one carries the ratio.
                ratio = update.scaling / scaling if i == "1" else 1.0
                a[rows, columns] = part[f"hada_w{i}_a"] * ratio
            tensors[f"hada_w{i}_a"] = a
            tensors[f"hada_w{i}_b"] = np.concatenate([part[f"hada_w{i}_b"] for part in parts])
        return tensors, rank, scaling * rank

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """From the packed adapter.

        Raises:
            ValueError: Ranks differ, or the factors touch other outputs.
        """
        scaling, blocks = updates[0].scaling, packed_blocks(updates)
        values: list[dict[str, np.ndarray]] = [{} for _ in updates]
        for i in "12":
            a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
            rest = a.copy()
            for (rows, columns), update, own in zip(blocks, updates, values, strict=True):
                ratio = update.scaling / scaling if i == "1" else 1.0
                own[f"hada_w{i}_a"] = a[rows, columns] / ratio
                own[f"hada_w{i}_b"] = b[columns]
                rest[rows, columns] = 0
            if blocks[-1][1].stop != b.shape[0] or np.any(rest):
                raise ValueError("The adapter is not one of the slices of this layer.")
        return values
