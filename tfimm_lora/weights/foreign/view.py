"""A foreign file, read tensor by tensor under timm's names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Shape = tuple[int, ...]


class TensorFile(Protocol):
    """What can be read like a :class:`~tfimm_lora.weights.safetensors_file.SafetensorsFile`."""

    path: Path
    shapes: dict[str, Shape]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """Rounds a value to the precision of a tensor in the file."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one timm weight is made of tensors of a foreign file.

    Attributes:
        sources: Names of the tensors in the file.
        shape: Shape of the weight, known before anything is read.
        convert: Turns the tensors into the weight; ``None`` takes the only one as it is.
    """

    sources: tuple[str, ...]
    shape: Shape
    convert: Callable[..., np.ndarray] | None = None


class Translation:
    """Collects what becomes of the tensors of a foreign file.

    Tensors that no recipe mentions are dropped, so a format keeps those that it does not know
    under their own names: the loader then says that the model has no such weight.

    Args:
        shapes: Shape of every tensor of the file by its name.

    Attributes:
        shapes: The same.
        recipes: The recipe of every timm weight, by its name.
        source_size: Height and width of the images that the position table is for, where the
            format knows better than a checkpoint's facts.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.recipes: dict[str, Recipe] = {}
        self.source_size: tuple[int, int] | None = None

    def keep(self, name: str, source: str) -> None:
        """A weight that is a tensor of the file."""
        self.recipes[name] = Recipe((source,), self.shapes[source])

    def keep_all(self, names: Mapping[str, str]) -> None:
        """Weights that are tensors of the file: timm names to names in the file."""
        for name, source in names.items():
            self.keep(name, source)

    def make(
        self, name: str, sources: Sequence[str], shape: Shape, convert: Callable[..., np.ndarray]
    ) -> None:
        """A weight that is computed from tensors of the file."""
        missing = [s for s in sources if s not in self.shapes]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}, which {name!r} is made of")
        self.recipes[name] = Recipe(tuple(sources), shape, convert)

    def reshape(self, name: str, source: str, shape: Shape) -> None:
        """A weight that is a tensor in another shape; one that cannot be is kept as it is."""
        if np.prod(shape) != np.prod(self.shapes[source]):
            self.keep(name, source)
        else:
            self.make(name, [source], shape, lambda value: value.reshape(shape))

    def transpose(self, name: str, source: str) -> None:
        """A weight that is a transposed matrix."""
        self.make(name, [source], self.shapes[source][::-1], lambda value: value.T)

    def slice(self, name: str, source: str, axis: int, start: int, stop: int | None = None) -> None:
        """A weight that is a part of a tensor along one axis."""
        shape, index = list(self.shapes[source]), slice(start, stop)
        shape[axis] = len(range(shape[axis])[index])
        self.make(
            name, [source], tuple(shape), lambda value: value[(slice(None),) * axis + (index,)]
        )

    def concatenate(self, name: str, sources: Sequence[str]) -> None:
        """A weight that is several tensors one behind the other."""
        first, *others = (self.shapes.get(s, (0,)) for s in sources)
        rows = first[0] + sum(shape[0] for shape in others)
        self.make(name, sources, (rows, *first[1:]), lambda *values: np.concatenate(values))

    def fill(self, name: str, shape: Shape, value: float) -> None:
        """A weight that is not in the file and has one known value."""
        self.make(name, [], shape, lambda: np.full(shape, value, "float32"))


class TranslatedFile:
    """A foreign file under timm's names; has the interface of ``SafetensorsFile``.

    Args:
        file: The open file.
        translation: How each weight is read.
        origin: What the file was recognised as, for messages.

    Attributes:
        path: Where it is.
        shapes: Shape of every weight by its timm name.
        metadata: The file's free-form strings.
        origin: What the file was recognised as.
        source_size: See :class:`Translation`.
    """

    def __init__(self, file: TensorFile, translation: Translation, origin: str) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.origin = origin
        self.source_size = translation.source_size
        self._file = file
        self._recipes = translation.recipes
        self.shapes = {name: recipe.shape for name, recipe in self._recipes.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads the tensors of one weight and makes the weight of them.

        Raises:
            ValueError: The tensors cannot be read, or not be put together.
        """
        recipe = self._recipes[name]
        values = [self._file.read(source) for source in recipe.sources]
        if recipe.convert is None:
            return values[0]
        try:
            value = recipe.convert(*values)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{self.path}, read as {self.origin}: {name!r} cannot be made of "
                f"{', '.join(recipe.sources)}: {error}."
            ) from error
        # A sum or a resize has the type of the checkpoint, as in timm.
        return self.rounded(name, value)

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """Rounds a float32 value to the precision that a weight has in the file."""
        sources = self._recipes[name].sources
        return self._file.rounded(sources[0], value) if sources else value


def renamed(names: Iterable[str], rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    r"""Applies regular expressions in turn to names.

    Args:
        names: Names in the file.
        rules: Pairs of a pattern and its replacement.

    Returns:
        Dictionary from the new to the old name.

    Example:
        >>> renamed(["norm_1.bias"], [(r"norm_([12])", r"norm\1")])
        {'norm1.bias': 'norm_1.bias'}
    """
    found = {}
    for name in names:
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        found[new] = name
    return found


def below(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Returns the names that start with a prefix: without it, to what they were."""
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}


def fuse_qkv(to: Translation, names: dict[str, str]) -> dict[str, str]:
    """Joins queries, keys and values that the file has one by one.

    Args:
        to: Gets the recipes of ``attn.qkv.weight`` and ``attn.qkv.bias`` of every block.
        names: New to old names, with the parts as ``attn.q``, ``attn.k``, ``attn.v``.

    Returns:
        The other names.
    """
    others = {}
    for name, source in names.items():
        match = re.fullmatch(r"(.*\battn)\.([qkv])\.(weight|bias)", name)
        if match is None:
            others[name] = source
            continue
        block, _, leaf = match.groups()
        # A part that is missing keeps this name, for the message.
        parts = [names.get(f"{block}.{p}.{leaf}", f"{block}.{p}.{leaf}") for p in "qkv"]
        to.concatenate(f"{block}.qkv.{leaf}", parts)
    return others


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to name and lay out weights that is not timm's.

    Attributes:
        title: What it is called in messages.
        recognise: Whether names and shapes of a file are of this format.
        translate: Adds the recipes of all timm weights; gets the model's config.
    """

    title: str
    recognise: Callable[[Mapping[str, Shape]], bool]
    translate: Callable[[Translation, Any], None]
