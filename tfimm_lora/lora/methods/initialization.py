"""First values of the factors A and B.

Most leave B at zero, so that step 0 is the base model. PiSSA and OLoRA start from parts of the
kernel. The papers take these parts out of the frozen kernel; here it stays as it is, and the
update is ``s (A B - A0 B0)`` with frozen copies of the first factors. That is the same function,
but the update starts at zero, without it the model is the base model, and several adapters share
one base.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

# More columns than wanted make the subspace of a randomised decomposition more exact.
_OVERSAMPLING = 8
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How factors begin.

    Attributes:
        factors: Initialisers of A and B of a rank; B's ``None`` is zeros.
        of_kernel: Makes A (rows, r) and B (r, outputs) of a kernel seen as a matrix, of the rank
            and of the update's scaling; the update then keeps copies of them. ``None`` where the
            kernel does not matter.
        one_matrix: Whether the kernel has to be one matrix, of which the factors are a part.
        residual_steps: How many times the factors and the quantised kernel are made of each other,
            so that together they are near the float kernel; 0 if the factors have nothing to do
            with that.
    """

    factors: Callable[[int], tuple[Any, Any]]
    of_kernel: Callable[[np.ndarray, int, float], tuple[np.ndarray, np.ndarray]] | None = None
    one_matrix: bool = False
    residual_steps: int = 0


def _kaiming_uniform(rank: int) -> tuple[Any, Any]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) in A: PEFT's default."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"), None


def _gaussian(rank: int) -> tuple[Any, Any]:
    """A standard deviation of 1/r in A, as in PEFT."""
    return keras.initializers.RandomNormal(stddev=1 / rank), None


def _orthogonal(rank: int) -> tuple[Any, Any]:
    """Both factors at random in orthogonal halves of the rank, so that A B = 0.

    Raises:
        ValueError: The rank is odd.
    """
    if rank % 2:
        raise ValueError(
            f"lora_init='orthogonal' gives A and B half of the ranks each, so the rank has to be "
            f"even, found {rank}."
        )
    # keras.utils.set_random_seed seeds this generator, too. Both factors need the same rotation.
    rotation = np.linalg.qr(_generator(random.getrandbits(32)).standard_normal((rank, rank)))[0]

    def half(first: int, of_b: bool) -> Callable[..., Any]:
        def draw(shape: tuple[int, ...], dtype: Any = None) -> Any:
            size = int(np.prod(shape)) // rank
            noise = _generator(random.getrandbits(32)).standard_normal((size, rank // 2))
            value = noise @ rotation[first::2] / 10.0
            value = value.T if of_b else value
            return keras.ops.convert_to_tensor(value.reshape(shape), dtype or "float32")

        return draw

    return half(0, False), half(1, True)


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _pissa(matrix: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular values, half of each to A and to B. Paper: arXiv:2404.02948."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return _halves(left, values, right, rank, scaling)


def _pissa_niter(steps: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """PiSSA by a randomised decomposition with so many subspace iterations (arXiv:0909.4061)."""

    def factors(matrix: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
        columns = min(rank + _OVERSAMPLING, *matrix.shape)
        sample = _generator(_SEED).standard_normal((matrix.shape[1], columns))
        basis = np.linalg.qr(matrix @ sample.astype(matrix.dtype))[0]
        for _ in range(steps):
            basis = np.linalg.qr(matrix.T @ basis)[0]
            basis = np.linalg.qr(matrix @ basis)[0]
        left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        return _halves(basis @ left, values, right, rank, scaling)

    return factors


def _halves(left: Any, values: Any, right: Any, rank: int, scaling: float) -> tuple[Any, Any]:
    root = np.sqrt(values[:rank] / scaling).astype(left.dtype)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _olora(matrix: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """The first columns and rows of the transposed kernel's Q R. Paper: arXiv:2406.01775."""
    q, r = np.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def factors_of_residual(
    kernel: np.ndarray,
    stored: Callable[[np.ndarray], np.ndarray],
    steps: int,
    rank: int,
    scaling: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What quantisation takes from a kernel, as low-rank factors. Paper: LoftQ, arXiv:2310.08659.

    Args:
        kernel: The float kernel as a matrix.
        stored: Quantises and dequantises a matrix.
        steps: How many times the rest is taken again.
        rank: Rank of the factors.
        scaling: Factor of the update.

    Returns:
        The matrix to quantise, A and B.
    """
    update = np.zeros_like(kernel)
    for _ in range(steps):
        base = kernel - update
        left, values, right = np.linalg.svd(kernel - stored(base), full_matrices=False)
        a, b = _halves(left, values, right, rank, scaling)
        update = a @ b * np.float32(scaling)
    return base, a, b


INITIALIZATIONS: dict[str, Initialization] = {
    "kaiming_uniform": Initialization(_kaiming_uniform),
    "gaussian": Initialization(_gaussian),
    "orthogonal": Initialization(_orthogonal, one_matrix=True),
    "pissa": Initialization(_kaiming_uniform, _pissa, one_matrix=True),
    "pissa_niter_N": Initialization(_kaiming_uniform, _pissa_niter(4), one_matrix=True),
    "olora": Initialization(_kaiming_uniform, _olora, one_matrix=True),
    "loftq": Initialization(_kaiming_uniform, one_matrix=True, residual_steps=1),
    "loftq_niter_N": Initialization(_kaiming_uniform, one_matrix=True, residual_steps=1),
    # A is set by initialize_eva, which needs images.
    "eva": Initialization(_kaiming_uniform),
}
"""Initialisations by name; N stands for a number of iterations."""


def family(name: str) -> str:
    """The name in ``INITIALIZATIONS``: ``pissa_niter_N`` for ``pissa_niter_4``.

    Args:
        name: A value of ``lora_init``.
    """
    return re.sub(r"_niter_(\w*)$", lambda m: "_niter_N" if _is_count(m[1]) else "_niter_", name)


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d?", text) is not None


def initialization(name: str) -> Initialization:
    """The initialisation of a value of ``lora_init``.

    Raises:
        ValueError: There is none.
    """
    found = INITIALIZATIONS.get(family(name))
    if found is None:
        raise ValueError(
            f"Unknown lora_init {name!r}. Use one of {', '.join(INITIALIZATIONS)} (N: a number of "
            "iterations from 1 to 99)."
        )
    if "_niter_" in name:
        steps = int(name.rpartition("_")[2])
        if found.residual_steps:
            return dataclasses.replace(found, residual_steps=steps)
        return dataclasses.replace(found, of_kernel=_pissa_niter(steps))
    return found


def keeps_first_factors(name: str | None) -> bool:
    """Whether an update with a ``lora_init`` has frozen copies of its first factors."""
    return name is not None and initialization(name).of_kernel is not None


def check_matrix(layer: Any, name: str, rank: int, sides: tuple[int, int]) -> None:
    """Raises unless factors of a rank can be made of a layer's kernel.

    Args:
        layer: The layer.
        name: A value of ``lora_init`` for one matrix.
        rank: The rank.
        sides: Rows and columns of the kernel, or of its slice.

    Raises:
        ValueError: The kernel is several matrices, or has not so many singular values.
    """
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    groups = layer.kernel.shape[2] if depthwise else getattr(layer, "groups", 1)
    if depthwise or groups > 1:
        raise ValueError(
            f"Layer {layer.name!r}: lora_init={name!r} takes a kernel as one matrix from inputs to "
            f"outputs, and this kernel is {groups} of them, one for each group of channels. Leave "
            "the layer out of lora_targets, or use another lora_init."
        )
    if rank > min(sides):
        raise ValueError(
            f"Layer {layer.name!r}: lora_init={name!r} with rank {rank}, and the kernel, "
            f"{sides[0]} x {sides[1]}, has only {min(sides)} ranks. Use a lower rank, for this "
            "layer alone through lora_rank_pattern."
        )
