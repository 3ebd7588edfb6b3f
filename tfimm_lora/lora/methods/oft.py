"""OFT: blocks of the kernel's rows are rotated. Paper: arXiv:2306.07280."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.rotation import (
    BlockOptions,
    Rotation,
    cayley,
    cayley_neumann,
    skew_from_triangle,
)
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class OFTOptions(BlockOptions):
    """Options of OFT.

    Attributes:
        block_size: Rows of a block; where it is no divisor of a kernel's rows, the nearest divisor
            is taken. Defaults to 32, unless ``blocks`` is given.
        blocks: Number of blocks (PEFT's ``r``) instead of their size; likewise.
        block_share: Whether all blocks of a layer share one rotation. Defaults to ``False``.
        cayley_neumann: Whether the rotation is a series that is orthogonal only approximately
            instead of the exact Cayley transform (PEFT's ``use_cayley_neumann``). Defaults to
            ``True``.
        num_cayley_neumann_terms: Terms of the series. Defaults to 5.
    """

    block_share: bool = False
    cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5


class OFT(Rotation):
    """Multiplies blocks of the kernel's rows with orthogonal matrices.

    Lengths of the columns, and angles between them within a block, stay as they are.
    """

    Options = OFTOptions
    default_block_size = 32
    peft_type = "OFT"
    peft_tensors = ("oft_R.weight",)

    def build(self) -> None:
        """Creates ``oft_r``: what is above the diagonals of skew-symmetric matrices, zeros.

        Raises:
            ValueError: A block has one row only, so there is nothing to rotate.
        """
        rows, size = self.layer.operation.kernel_sides(self.layer)[0], self.block_size
        if size == 1:
            raise ValueError(
                f"Layer {self.layer.name!r}: the kernel has {rows} rows, and the divisor nearest "
                "to what lora_options ask for gives blocks of one row, which cannot be rotated. "
                f"Use lora_options={{'block_size': {rows}}} for this layer, or leave it out."
            )
        blocks = 1 if self.options.block_share else rows // size
        self.add_weight("oft_r", (blocks, size * (size - 1) // 2), "zeros")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The rotation of every block."""
        size = self.block_size
        skew = skew_from_triangle(values["oft_r"], size)
        if self.options.cayley_neumann:
            rotation = cayley_neumann(skew, self.options.num_cayley_neumann_terms)
        else:
            rotation = cayley(skew)
        if self.options.block_share:
            blocks = self.layer.operation.kernel_sides(self.layer)[0] // size
            rotation = ops.repeat(rotation, blocks, axis=0)
        return Update(rotation=rotation)

    def neutral(self) -> dict[str, np.ndarray]:
        """Zeros, which make identities."""
        return {"oft_r": np.zeros(self.variables["oft_r"].shape, "float32")}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Size or number of blocks, and how they are made.

        Raises:
            ValueError: The adapter is of the constrained variant, which is not there.
        """
        if config.get("coft"):
            raise ValueError("The adapter has coft=True, constrained OFT, which cannot be read.")
        blocks = config.get("r") or None
        options = {
            "block_size": None if blocks else config.get("oft_block_size", cls.default_block_size),
            "blocks": blocks,
            "block_share": bool(config.get("block_share", False)),
            "cayley_neumann": bool(config.get("use_cayley_neumann", True)),
            "num_cayley_neumann_terms": config.get("num_cayley_neumann_terms", 5),
        }
        return {"lora_options": {k: v for k, v in options.items() if v is not None}}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``OFTConfig``."""
        options = cls.Options(**fields.lora_options)
        size = 0 if options.blocks else options.block_size or cls.default_block_size
        bias = fields.lora_train_bias
        return {
            "bias": "oft_only" if bias == "lora_only" else bias,
            "block_share": options.block_share,
            "coft": False,
            "fan_in_fan_out": False,
            "init_weights": True,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": options.num_cayley_neumann_terms,
            "oft_block_size": size,
            "r": options.blocks or 0,
            "use_cayley_neumann": options.cayley_neumann,
        }

    def to_peft(self) -> dict[str, np.ndarray]:
        """``oft_R.weight``, of the same shape."""
        return {"oft_R.weight": self.numpy_values()["oft_r"]}

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensor."""
        return {"oft_r": tensors["oft_R.weight"]}
