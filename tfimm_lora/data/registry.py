"""A table of named things that suggests the nearest name when one is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_Entry = TypeVar("_Entry")


class Registry(Generic[_Entry]):
    """Named entries, each registered by a decorator in the file that defines it.

    Args:
        kind: What an entry is called in error messages, such as ``"data source"``.

    Example:
        >>> SOURCES = Registry("data source")
        >>> @SOURCES.register("digits")
        ... def open_digits(config, argument): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str) -> Callable[[_Entry], _Entry]:
        """Returns a decorator that registers an entry.

        Args:
            name: The entry's name.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._entries:
            raise ValueError(f"The {self.kind} {name!r} is registered already.")

        def add(entry: _Entry) -> _Entry:
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(
                f"Unknown {self.kind} {name!r}.{suggest(name, self)} "
                f"Known: {', '.join(sorted(self))}."
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def suggest(name: str, known: object, count: int = 3) -> str:
    """Returns `` Did you mean 'a' or 'b'?`` for the names nearest to a mistyped one, or ``""``.

    Args:
        name: What was typed.
        known: Iterable of the names that exist.
        count: Number of suggestions at most. Defaults to 3.

    Example:
        >>> suggest("digit", ["digits", "folder"])
        " Did you mean 'digits'?"
    """
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)  # type: ignore[call-overload]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
