"""QA-LoRA: W + (alpha / r) A B with inputs averaged in groups. Paper: arXiv:2309.14717."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.lora import LoRA
from tfimm_lora.lora.update import Update
from tfimm_lora.quantization.registry import kernel_format
from tfimm_lora.quantization.row_scaled import RowScaledFormat


@dataclasses.dataclass(frozen=True)
class QALoRAOptions:
    """Options of QA-LoRA.

    Attributes:
        group_size: Rows of the kernel that share a row of A (PEFT's ``qalora_group_size``); where
            it does not divide the rows, the largest smaller divisor is taken. Defaults to 16.
    """

    group_size: int = 16

    def __post_init__(self) -> None:
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"group_size has to be an integer of at least 1, found {size!r}.")


class QALoRA(LoRA):
    """A low-rank update that is the same for all rows of a group.

    A quantised kernel with one zero point for each group and output can take up such an update
    without being quantised again. A has a row for each group; it reads the sum of the group's
    inputs times ``groups / group_size``, which is what PEFT computes.
    """

    Options: ClassVar[type] = QALoRAOptions
    initializations = ()
    # Also where the layer has groups: these share the ranks.
    ranks_by_group: ClassVar[tuple[str, ...]] = ()
    peft_tensors: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    @classmethod
    def kernel_format(
        cls, name: str | None, group_size: int | None, options: Mapping[str, Any]
    ) -> tuple[str | None, int | None]:
        """Integers have zero points, and no group of theirs lies in two of the method's.

        Raises:
            ValueError: The group sizes do not fit each other, or rows have factors of their own.
        """
        if name is None or name == "nf4":
            return name, group_size
        if isinstance(kernel_format(name), RowScaledFormat):
            raise ValueError(
                f"qalora on {name}: its rows have factors of their own, so that zero points cannot "
                f"take up the update. Use {name.removesuffix('-row-scaled')} "
                "(with calibration: algorithm='gptq')."
            )
        own = QALoRAOptions(**options).group_size
        group_size = own if group_size is None else group_size
        if own % group_size:
            raise ValueError(
                f"lora_options={{'group_size': {own}}}: QA-LoRA's groups have to consist of whole "
                f"groups of the kernel, which have {group_size} rows (lora_group_size). Use a "
                f"multiple of {group_size}."
            )
        plain = name.removesuffix("-symmetric").removesuffix("-asymmetric")
        return f"{plain}-asymmetric" if plain.endswith("8") else plain, group_size

    @property
    def group_size(self) -> int:
        """Rows of a group."""
        rows = self.layer.operation.kernel_sides(self.layer)[0]
        if self.variables:
            return rows // self.variables["kernel_lora_a"].shape[0]
        format = self.layer.kernel_format
        # Whole groups of the kernel, where it has zero points.
        unit = 1 if format is None or format.name == "nf4" else self.layer.group_size
        largest = min(max(self.options.group_size, unit), rows)
        return max(n for n in range(unit, largest + 1, unit) if rows % n == 0)

    def grouped(self, group_size: int) -> np.ndarray | None:
        """A B, with each row as often as its group has groups of the kernel."""
        if self.group_size % group_size:
            return None
        a, b = (self.numpy_values()[f"kernel_lora_{x}"].astype(np.float64) for x in "ab")
        update = a @ b * (self.scaling * len(a) / self.group_size)
        return np.repeat(update, self.group_size // group_size, axis=0)

    def build(self) -> None:
        """Creates ``kernel_lora_a`` (groups, r) and ``kernel_lora_b`` (r, outputs)."""
        rows = self.layer.operation.kernel_sides(self.layer)[0]
        uniform = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        self.add_weight("kernel_lora_a", (rows // self.group_size, self.site.rank), uniform)
        self.add_weight("kernel_lora_b", (self.site.rank, self.site.size), "zeros")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """A with every row as often as its group has inputs, and B."""
        size, operation = self.group_size, self.layer.operation
        a, b = values["kernel_lora_a"], values["kernel_lora_b"] * self.scaling
        a = ops.repeat(a, size, axis=0) * (a.shape[0] / size)
        if getattr(self.layer, "groups", 1) > 1:
            # Groups of a convolution have ranks of their own in its factors, here all share them.
            return Update(delta=operation.from_matrix(self.layer, ops.matmul(a, b)))
        a, b = operation.factors(self.layer, a, b)
        return Update(a=a, b=b)

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """LORA with ``use_qalora`` alone."""
        flags = [f for f in ("use_rslora", "use_dora", "use_qalora") if config.get(f)]
        return config.get("peft_type") == cls.peft_type and flags == ["use_qalora"]

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, alpha, dropout and the size of the groups."""
        options = {"group_size": config.get("qalora_group_size", 16)}
        return {**super().fields_from_peft(config), "lora_options": options}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """LoRA's, with ``use_qalora``."""
        size = fields.lora_options.get("group_size", QALoRAOptions.group_size)
        own = {"use_qalora": True, "qalora_group_size": size, "lora_bias": False}
        return {**super().peft_config(fields), "init_lora_weights": True, **own}

    def to_peft(self) -> dict[str, np.ndarray]:
        """``lora_A.weight`` (r, groups) and ``lora_B.weight`` (out, r)."""
        values = self.numpy_values()
        return {
            "lora_A.weight": values["kernel_lora_a"].T,
            "lora_B.weight": values["kernel_lora_b"].T,
        }

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors.

        Raises:
            ValueError: The file was trained without groups.
        """
        a = tensors["lora_A.weight"].T
        if a.shape[0] == self.layer.operation.kernel_sides(self.layer)[0] and self.group_size > 1:
            raise ValueError(
                "the config has use_qalora, but A has a column for every input: PEFT ignores the "
                "flag on layers that are not quantised by GPTQ. Set use_qalora to false in "
                "adapter_config.json: the adapter is plain LoRA"
            )
        return {"kernel_lora_a": a, "kernel_lora_b": tensors["lora_B.weight"].T}
