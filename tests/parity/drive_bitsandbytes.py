"""Quantises matrices with bitsandbytes on the CPU: ``drive_bitsandbytes.py FOLDER``.

The folder holds bitsandbytes apart from the other oracles' packages (``pip install --no-deps
--target``), since PEFT and transformers behave otherwise where they can import it.

bitsandbytes finds the codes of the second level, absmax values less their mean, in two ways. Its
portable kernel takes the nearest value of the map. Its compiled one for CPUs first rounds to a grid
of 65,536 values, which moves a few codes. Both are answered.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from serve import serve

sys.path.append(sys.argv[1])
import bitsandbytes
from bitsandbytes import functional

torch.set_num_threads(1)
SECOND_LEVEL_BLOCK = 256


def portable(values: torch.Tensor) -> tuple[torch.Tensor, functional.QuantState]:
    """``functional.quantize_blockwise`` with the kernel for any device instead of the CPU's."""
    code = functional.create_dynamic_map()
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, values, code, SECOND_LEVEL_BLOCK
    )
    state = functional.QuantState(
        absmax=absmax, code=code, blocksize=SECOND_LEVEL_BLOCK, dtype=torch.float32
    )
    return codes, state


def tables(out: str) -> dict[str, Any]:
    """The 16 values of NF4 and the 256 of the signed dynamic map, in ascending order."""
    np.savez(
        out,
        nf4=functional.get_4bit_type("nf4", device="cpu").numpy(),
        dynamic=functional.create_dynamic_map().numpy(),
    )
    return {"version": bitsandbytes.__version__}


def quantize(out: str, matrices: str, block: int = 64) -> dict[str, Any]:
    """NF4 with double quantisation of the float32 matrices (outputs, inputs) of an .npz.

    A matrix NAME may come with ``offset.NAME``, a scalar to be taken from the absmax values instead
    of torch's float32 mean, which depends on the order of summation. What is written, flat arrays
    in the order of the matrix's blocks except for the last:

        NAME.codes           0 to 15, one for each value of the matrix
        NAME.packed          the same as bitsandbytes stores them, the first of two in the high bits
        NAME.absmax          float32, before the second level
        NAME.offset          their mean, or what was given
        NAME.absmax_codes    0 to 255, by the portable kernel
        NAME.absmax_codes_cpu  by the one for CPUs
        NAME.second_absmax   float32, one for 256 values of absmax
        NAME.dequantized     float32 (outputs, inputs), from the portable kernel's codes
    """
    with np.load(matrices) as archive:
        given = dict(archive.items())
    found = {}
    for name in (name for name in given if not name.startswith("offset.")):
        # A single row: with several whose length the block does not divide, the compiled kernel
        # dequantises by other scales than those that quantisation found (version 0.50.2).
        matrix = torch.from_numpy(given[name]).reshape(1, -1)
        packed, state = functional.quantize_4bit(matrix, blocksize=block, quant_type="nf4")
        absmax = state.absmax
        offset = torch.as_tensor(given.get(f"offset.{name}", absmax.mean()), dtype=torch.float32)
        codes, second = portable(absmax - offset)
        codes_cpu, _ = functional.quantize_blockwise(absmax - offset, blocksize=SECOND_LEVEL_BLOCK)
        nested = functional.QuantState(
            absmax=codes,
            shape=matrix.shape,
            dtype=matrix.dtype,
            blocksize=block,
            code=state.code,
            quant_type="nf4",
            offset=offset,
            state2=second,
        )
        nibbles = torch.stack([packed.ravel() >> 4, packed.ravel() & 15], 1).ravel()
        answers = {
            "codes": nibbles[: matrix.numel()],
            "packed": packed.ravel(),
            "absmax": absmax,
            "offset": offset,
            "absmax_codes": codes,
            "absmax_codes_cpu": codes_cpu,
            "second_absmax": second.absmax,
            "dequantized": functional.dequantize_4bit(packed, nested).reshape(given[name].shape),
        }
        found.update({f"{name}.{key}": value.numpy() for key, value in answers.items()})
    np.savez(out, **found)
    return {"version": bitsandbytes.__version__}


if __name__ == "__main__":
    serve({"tables": tables, "quantize": quantize})
