"""Regular expressions from files of strangers, matched in bounded time.

Python's own matcher tries one way after the other, and for ``(a+)+$`` there are exponentially many.
The ``regex`` package reads the same patterns and can be told when to stop.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regex

MAX_LENGTH = 20_000
MAX_NAME = 1_000
SECONDS = 1.0


class UnsupportedRegexError(ValueError):
    """A pattern is no regular expression, or one that cannot be matched in bounded time."""


def fullmatch(pattern: str, text: str) -> bool:
    r"""Whether a regular expression matches a whole text, as ``re.fullmatch`` says.

    Args:
        pattern: The pattern.
        text: A name.

    Raises:
        UnsupportedRegexError: The pattern is no regular expression, is too long, or takes too long.

    Example:
        >>> fullmatch(r"blocks\.\d+\.mlp\.fc.", "blocks.3.mlp.fc1")
        True
    """
    return _found("fullmatch", pattern, text)


def match_start(pattern: str, text: str) -> bool:
    """Whether a regular expression matches the beginning of a text, as ``re.match`` says.

    Raises:
        UnsupportedRegexError: As for :func:`fullmatch`.

    Example:
        >>> match_start("block", "blocks.3")
        True
    """
    return _found("match", pattern, text)


def check_regex(pattern: Any) -> None:
    """Raises unless a pattern can be matched.

    Raises:
        UnsupportedRegexError: Says why not.
    """
    if not isinstance(pattern, str):
        raise UnsupportedRegexError(f"{pattern!r} is no text.")
    _compiled(pattern)


def _found(how: str, pattern: str, text: str) -> bool:
    if len(text) > MAX_NAME:
        raise UnsupportedRegexError(
            f"A name has {len(text)} characters, at most {MAX_NAME} can be."
        )
    try:
        return getattr(_compiled(pattern), how)(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise UnsupportedRegexError(
            f"The regular expression {_shown(pattern)} takes more than {SECONDS:g} s on {text!r}."
        ) from error


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> Any:
    if len(pattern) > MAX_LENGTH:
        raise UnsupportedRegexError(
            f"The regular expression {_shown(pattern)} has {len(pattern):,} characters, at most "
            f"{MAX_LENGTH:,} are read."
        )
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise UnsupportedRegexError(
            f"{_shown(pattern)} is no regular expression: {error}."
        ) from error


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}...")
