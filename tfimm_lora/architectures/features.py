"""Which intermediate features a model has and which of them are wanted, in timm's terms."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any


def take_indices(
    count: int, indices: int | Sequence[int] | None = None, name: str = "indices"
) -> tuple[int, ...]:
    """Resolves a choice of features.

    Args:
        count: Number of features that the model has.
        indices: An integer n for the last n; a list of numbers from 0, or from -1 backwards;
            ``None`` (the default) for all.
        name: What the argument is called in an error message. Defaults to ``indices``.

    Returns:
        Numbers from 0, each once, in the order in which the model computes them.

    Raises:
        ValueError: A number is out of range or there twice, or nothing is chosen.

    Example:
        >>> take_indices(12, [-1, 2])
        (2, 11)
    """
    if indices is None:
        return tuple(range(count))
    if not isinstance(indices, (list, tuple)):
        last = _integer(indices, name)
        if not 1 <= last <= count:
            raise ValueError(
                f"{name}={last} asks for the last {last} features; choose 1 to {count} of them, or "
                f"give a list such as [0, {count - 1}]."
            )
        return tuple(range(count - last, count))
    taken = []
    for index in (_integer(i, name) for i in indices):
        if not -count <= index < count:
            raise ValueError(
                f"{name}: there is no feature {index}. The {count} features are numbered 0 to "
                f"{count - 1}, or {-count} to -1."
            )
        taken.append(index % count)
    if not taken or len(set(taken)) < len(taken):
        raise ValueError(
            f"{name} has to name one feature or more, each once, found {list(indices)}."
        )
    return tuple(sorted(taken))


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} has to be an integer, a list of integers or None, found {value!r}."
        ) from None


class FeatureInfo:
    """Facts about a model's features, read as timm's class of this name.

    ``info[i]`` and ``len(info)`` are about all features of the model; the methods, without an
    index, are about those that an extractor returns, in its order.

    Args:
        info: One dictionary for each feature of the model: ``num_chs``, its channels;
            ``reduction``, its stride in pixels; ``module``, the timm path of the layer behind
            which it is taken; and ``index``.
        out_indices: Numbers of the features that are returned.

    Example:
        >>> info = tfimm_lora.create_model("convnext_tiny", features_only=True).feature_info
        >>> info.channels(), info.reduction()
        ([96, 192, 384, 768], [4, 8, 16, 32])
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the returned features, or of those with the given numbers."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides in pixels of the returned features, or of those with the given numbers."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Paths of the layers behind which features are taken."""
        return self.get("module", idx)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One fact: a list for ``None`` (the returned features) or a list of numbers."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self) -> list[dict[str, Any]]:
        """All facts about the returned features."""
        return [dict(self.info[i]) for i in self.out_indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.info)
