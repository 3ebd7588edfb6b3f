"""How tensors of several adapters become one: weighted sums, pruning, election of signs, SVD.

Papers: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Rules for tensors: for the factors, or (``_svd``) for the whole updates."""

PRUNING = RULES[1:]
"""Rules that prune, and need a density."""

MAJORITIES = ("total", "frequency")


def combine_tensors(
    rule: str,
    tensors: Sequence[np.ndarray],
    weights: Sequence[float],
    density: float | None,
    majority: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Makes one tensor of several.

    Args:
        rule: One of ``RULES``. ``linear`` adds; the others prune each tensor first, by magnitude
            or at random (``dare``, what is left is divided by the density); ``ties`` then leaves
            out what has not the sign of the majority, and divides by the number of those left.
        tensors: The tensors, of one shape.
        weights: A weight for each.
        density: Share of the values that is left, in (0, 1].
        majority: ``total`` elects signs by the sum of the values, ``frequency`` by their number.
        generator: Random numbers for ``dare``.
    """
    if rule.startswith("dare"):
        tensors = [_prune_at_random(t, density or 1.0, generator) for t in tensors]
    elif rule != "linear":
        tensors = [_prune_by_magnitude(t, density or 1.0) for t in tensors]
    stack = np.stack(tensors)
    weighted = stack * np.asarray(weights, stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    if not rule.endswith("ties"):
        return weighted.sum(axis=0)
    votes = stack.sum(axis=0) if majority == "total" else np.sign(stack).sum(axis=0)
    agrees = np.sign(stack) == np.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def _prune_by_magnitude(tensor: np.ndarray, density: float) -> np.ndarray:
    if density >= 1:
        return tensor
    flat = np.zeros(tensor.size, tensor.dtype)
    largest = np.argsort(-np.abs(tensor).reshape(-1), kind="stable")[: int(density * tensor.size)]
    flat[largest] = tensor.reshape(-1)[largest]
    return flat.reshape(tensor.shape)


def _prune_at_random(
    tensor: np.ndarray, density: float, generator: np.random.Generator
) -> np.ndarray:
    if density >= 1:
        return tensor
    return (tensor * (generator.random(tensor.shape) < density) / density).astype(tensor.dtype)


def low_rank_factors(
    matrix: np.ndarray, rank: int, groups: int = 1, clamp: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of a matrix by two thin ones.

    Args:
        matrix: (rows, outputs).
        rank: Rank of the approximation; a multiple of ``groups``.
        groups: Number of equal groups of outputs; each gets rank / groups ranks of its own.
        clamp: Quantile at which the factors' values are cut off on both sides; of the values and
            their negatives, as the signs of singular vectors are free (PEFT takes those that its
            library happens to give).

    Returns:
        (rows, rank), group after group, and (rank / groups, outputs).
    """
    per_group = rank // groups
    parts = [_factors(part, per_group, clamp) for part in np.split(matrix, groups, axis=1)]
    return tuple(np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))  # type: ignore


def _factors(matrix: np.ndarray, rank: int, clamp: float | None) -> tuple[np.ndarray, np.ndarray]:
    u, s, vh = np.linalg.svd(matrix.T.astype("float32"), full_matrices=False)
    u, vh = (u * s)[:, :rank], vh[:rank]
    if clamp is not None:
        values = np.concatenate([u.reshape(-1), vh.reshape(-1)])
        bound = np.quantile(np.concatenate([values, -values]), clamp)
        u, vh = np.clip(u, -bound, bound), np.clip(vh, -bound, bound)
    missing = rank - len(vh)
    return np.pad(vh.T, ((0, 0), (0, missing))), np.pad(u.T, ((0, missing), (0, 0)))


def concatenate_ranks(
    factors: Sequence[tuple[np.ndarray, np.ndarray]], groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the ranks of several factor pairs side by side.

    Args:
        factors: Pairs of A, whose last axis are the ranks, group after group, and B, whose first
            axis are the ranks of one group.
        groups: Number of groups.
    """
    split = [a.reshape(*a.shape[:-1], groups, -1) for a, _ in factors]
    a = np.concatenate(split, axis=-1)
    return a.reshape(*a.shape[:-2], -1), np.concatenate([b for _, b in factors])


def signed_roots(weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Weights of A and of B whose product is the weight; the sign is A's."""
    root: Callable[[float], float] = lambda w: float(np.sqrt(abs(w)))  # noqa: E731
    return [root(w) if w >= 0 else -root(w) for w in weights], [root(w) for w in weights]
