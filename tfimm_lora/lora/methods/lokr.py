"""LoKr: W + (alpha / r) W1 (x) W2, a Kronecker product. Paper: arXiv:2212.10650 (KronA)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.lycoris import Lycoris, tucker_rows
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class LoKrOptions:
    """Options of LoKr.

    Attributes:
        decompose_both: Whether the first factor too is a product of thin ones where the rank is
            small enough. Defaults to ``False``.
        decompose_factor: Size of the first factor's sides; sides that it does not divide get the
            most even division up to it. Defaults to -1, the most even division.
        use_effective_conv2d: Whether kernels larger than 1 x 1 are taken apart with a core for
            their height and width (``lokr_t2``) instead of being flattened. Defaults to ``False``.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False

    def __post_init__(self) -> None:
        factor = self.decompose_factor
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ValueError(
                "decompose_factor in lora_options has to be -1 or an integer of at least 1, found "
                f"{factor!r}."
            )


class LoKr(Lycoris):
    """Adds the Kronecker product of two small matrices, the second itself of low rank.

    The inputs, seen as a matrix, are multiplied with one factor from the left and with the other
    from the right where that is less work; else the product is added to the kernel in each step.
    """

    Options = LoKrOptions
    initializations = ("kaiming_uniform", "lycoris")
    scaled = ("lokr_w1", "lokr_w1_a")
    peft_type = "LOKR"
    peft_tensors = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
    )  # fmt: skip

    def build(self) -> None:
        """Creates ``lokr_w1`` (l, m) and ``lokr_w2`` (k, n), or the factors of each."""
        rank, factor = self.site.rank, self.options.decompose_factor
        l, k = factorization(self.site.size, factor)  # noqa: E741
        m, n = factorization(self.channels, factor)
        spatial = self.spatial
        if self.options.decompose_both and rank < max(l, m) / 2:
            self._add("lokr_w1_a", (l, rank))
            self._add("lokr_w1_b", (rank, m))
        else:
            self._add("lokr_w1", (l, m))
        if rank >= max(k, n) / 2:
            self._add("lokr_w2", (k, n, *spatial))
        elif self.effective:
            self._add("lokr_t2", (rank, rank, *spatial))
            self._add("lokr_w2_a", (rank, k))
            self._add("lokr_w2_b", (rank, n))
        else:
            self._add("lokr_w2_a", (k, rank))
            self._add("lokr_w2_b", (rank, n * math.prod(spatial)))

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self._zero_at_first():
            self.add_weight(name, shape, "zeros")
        else:
            self.add_uniform(name, shape)

    def _zero_at_first(self) -> tuple[str, ...]:
        return ("lokr_w2", "lokr_w2_b") if self.init == "lycoris" else ("lokr_w1", "lokr_w1_a")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The two factors, the first scaled."""
        if "lokr_w1" in values:
            left = ops.transpose(values["lokr_w1"])
        else:
            left = ops.transpose(ops.matmul(values["lokr_w1_a"], values["lokr_w1_b"]))
        return Update(kron=(left * self.scaling, self._right(values)))

    def _right(self, values: Mapping[str, Any]) -> Any:
        """The second factor in the layout of a kernel, (h, w, n, k) or (n, k)."""
        spatial = self.spatial
        if "lokr_w2" in values:
            right = values["lokr_w2"]
        else:
            a, b = values["lokr_w2_a"], values["lokr_w2_b"]
            if self.effective:
                a, b = ops.transpose(a), tucker_rows(values["lokr_t2"], b)
            right = ops.reshape(ops.matmul(a, b), (a.shape[0], -1, *spatial))
        return ops.transpose(right, (2, 3, 1, 0) if spatial else (1, 0))

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The inner axes of all products."""
        of_a = (0,) if self.effective else (1,)
        return {
            "lokr_w1_a": (1,), "lokr_w1_b": (0,),
            "lokr_w2_a": of_a, "lokr_w2_b": (0,), "lokr_t2": (0, 1),
        }  # fmt: skip

    def aligned(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Products where this update has whole factors, because its rank is higher."""
        found = dict(values)
        if "lokr_w1" in self.variables and "lokr_w1" not in found:
            found["lokr_w1"] = found["lokr_w1_a"] @ found["lokr_w1_b"]
        if "lokr_w2" in self.variables and "lokr_w2" not in found:
            right = ops.convert_to_numpy(self._right(found))
            found["lokr_w2"] = right.transpose((3, 2, 0, 1) if self.spatial else (1, 0))
        return found

    def neutral(self) -> dict[str, np.ndarray]:
        """What is zero at the start."""
        return {
            name: np.zeros(variable.shape, "float32")
            for name, variable in self.variables.items()
            if name in self._zero_at_first()
        }

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``LoKrConfig``."""
        return {**super().peft_config(fields), "rank_dropout_scale": False}


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Divides a size into two, the smaller first, as PEFT does.

    Args:
        size: What is divided.
        factor: The first number, if it divides; else the largest that the first may be. -1 asks
            for the two that are nearest to each other. Defaults to -1.

    Example:
        >>> factorization(768)
        (24, 32)
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    # From the square root downwards, the first divisor is the largest of the smaller ones.
    smaller = next(d for d in range(min(math.isqrt(size), limit), 0, -1) if size % d == 0)
    return smaller, size // smaller
