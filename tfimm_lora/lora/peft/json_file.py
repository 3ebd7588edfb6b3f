"""JSON from files of strangers: small, flat enough, without ambiguity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: The file is too large or no JSON object, see :func:`parse_json`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config of an adapter has a few thousand.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON object: {error}.") from error
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: The text.
        source: Where it is from, for messages.

    Raises:
        ValueError: It is no JSON object, names a key twice, nests too deeply, or has a number that
            is not finite.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{source}: {len(text):,} characters of JSON are more than can be meant.")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(f"{source} is no JSON object: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{source} is no JSON object: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is no JSON object: it is a {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value
