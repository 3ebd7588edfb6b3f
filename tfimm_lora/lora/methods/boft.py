"""BOFT: the kernel's rows are rotated by butterflies of blocks. Paper: arXiv:2311.06243."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.rotation import BlockOptions, Rotation, cayley
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class BOFTOptions(BlockOptions):
    """Options of BOFT.

    Attributes:
        block_size: Rows of a block; where it is no divisor of a kernel's rows, the nearest divisor
            is taken. Defaults to 4, unless ``blocks`` is given.
        blocks: Number of blocks instead of their size; likewise.
        n_butterfly_factor: Number of sparse factors of the rotation; m of them mix
            2^(m - 1) blocks. Defaults to 1, blocks by themselves.
    """

    n_butterfly_factor: int = 1


class BOFT(Rotation):
    """Rotates the kernel's rows by a product of sparse orthogonal matrices, and scales outputs.

    Factor i takes blocks of two halves that lie 2^i halves apart, as in a fast Fourier transform.
    """

    Options = BOFTOptions
    default_block_size = 4
    peft_type = "BOFT"
    peft_tensors = ("boft_R", "boft_s")

    def build(self) -> None:
        """Creates ``boft_r``, zeros, and ``boft_s``, ones.

        Raises:
            ValueError: The rows cannot be mixed by so many factors.
        """
        rows, size = self.layer.operation.kernel_sides(self.layer)[0], self.block_size
        factors = self.options.n_butterfly_factor
        mixed = size * 2 ** (factors - 1)
        if factors > 1 and (rows % mixed or size % 2):
            raise ValueError(
                f"Layer {self.layer.name!r}: {factors} butterfly factors of blocks of {size} rows "
                f"mix {mixed} rows at a time, which needs an even block size and a multiple of "
                f"{mixed} rows; the kernel has {rows}. Use a lower n_butterfly_factor or another "
                "block_size in lora_options."
            )
        self.add_weight("boft_r", (factors, rows // size, size, size), "zeros")
        self.add_weight("boft_s", (self.site.size,), "ones")

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The rotation, and the gain of the outputs (not of the bias)."""
        return Update(rotation=butterfly(values["boft_r"]), gain=values["boft_s"])

    def neutral(self) -> dict[str, np.ndarray]:
        """Identities and ones."""
        return {
            "boft_r": np.zeros(self.variables["boft_r"].shape, "float32"),
            "boft_s": np.ones(self.variables["boft_s"].shape, "float32"),
        }

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Size or number of blocks, and the number of factors."""
        blocks = config.get("boft_block_num") or None
        options = {
            "block_size": None if blocks else config.get("boft_block_size", cls.default_block_size),
            "blocks": blocks,
            "n_butterfly_factor": config.get("boft_n_butterfly_factor", 1),
        }
        return {"lora_options": {k: v for k, v in options.items() if v is not None}}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``BOFTConfig``."""
        options = cls.Options(**fields.lora_options)
        bias = fields.lora_train_bias
        return {
            "bias": "boft_only" if bias == "lora_only" else bias,
            "boft_block_num": options.blocks or 0,
            "boft_block_size": 0
            if options.blocks
            else options.block_size or cls.default_block_size,
            "boft_dropout": 0.0,
            "boft_n_butterfly_factor": options.n_butterfly_factor,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def to_peft(self) -> dict[str, np.ndarray]:
        """``boft_R`` and ``boft_s``, (out, 1), for convolutions (1, out)."""
        values = self.numpy_values()
        scale = values["boft_s"]
        convolution = isinstance(self.layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D))
        return {
            "boft_R": values["boft_r"],
            "boft_s": scale[None] if convolution else scale[:, None],
        }

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors.

        Raises:
            ValueError: PEFT, without its CUDA extension, left butterfly factors out.
        """
        found, factors = tensors["boft_R"], self.options.n_butterfly_factor
        if found.shape[0] != factors:
            raise ValueError(
                f"{self.layer.path}: the config says {factors} butterfly factors, and the adapter "
                f"has {found.shape[0]} (PEFT without its CUDA extension always makes one). "
                f"Write boft_n_butterfly_factor={found.shape[0]} in adapter_config.json."
            )
        return {"boft_r": found, "boft_s": tensors["boft_s"].reshape(-1)}


def butterfly(blocks: Any) -> Any:
    """The rotation that a stack of blocks makes.

    Args:
        blocks: (factors, blocks, size, size), any matrices: their skew-symmetric part counts.

    Returns:
        (blocks / 2^(factors - 1), n, n) with n = 2^(factors - 1) size: orthogonal matrices for
        consecutive rows.
    """
    factors, number, size, _ = blocks.shape
    flat = ops.reshape(blocks, (factors * number, size, size))
    skew = 0.5 * (flat - ops.transpose(flat, (0, 2, 1)))
    orthogonal = ops.reshape(cayley(skew), blocks.shape)
    if factors == 1:
        return orthogonal[0]
    mixed, half = size * 2 ** (factors - 1), size // 2
    groups = number * size // mixed
    total = ops.broadcast_to(ops.eye(mixed, dtype=blocks.dtype), (groups, mixed, mixed))
    for i in range(factors):
        apart = 2**i
        # Rows as (pair of runs, run, half block); block v takes half v of either run.
        shape = (number // apart, 2, apart, half, mixed)
        factor = ops.reshape(orthogonal[i], (number // apart, apart, 2, half, 2, half))
        turned = ops.einsum("gvupws,gwvsl->guvpl", factor, ops.reshape(total, shape))
        total = ops.reshape(turned, (groups, mixed, mixed))
    return total
