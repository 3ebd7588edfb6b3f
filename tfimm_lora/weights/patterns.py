"""Patterns on timm paths, such as those of ``lora_targets``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from tfimm_lora.weights.regex import UnsupportedRegexError, check_regex, fullmatch

_REGEX = re.compile(r"[\\()|^$+{}]|^\.\*")


def matches(pattern: str, module: str) -> bool:
    r"""Whether a pattern matches a timm path.

    A pattern is a name or a wildcard for the whole path or for its end (from a dot on). With one
    of ``\ ( ) | ^ $ + { }``, or ``.*`` in front, it is a regular expression for the whole path.

    Args:
        pattern: ``mlp.fc1``, ``blocks.[0-3].attn.*`` or ``blocks\.(1|7)\.mlp\.fc.``, say.
        module: ``blocks.3.mlp.fc1``, say.

    Raises:
        ValueError: A regular expression takes too long.

    Example:
        >>> matches("mlp.fc1", "blocks.3.mlp.fc1")
        True
    """
    if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}"):
        return True
    # Read as a regular expression, the wildcard blocks.1.* would match blocks.10 as well.
    if not is_regex(pattern):
        return False
    try:
        check_regex(pattern)
    except UnsupportedRegexError:
        return False
    # One that takes too long is an error: it may be from a stranger's file.
    return fullmatch(pattern, module)


def is_regex(pattern: str) -> bool:
    """Whether a pattern is read as a regular expression if it matches no name as a wildcard."""
    return _REGEX.search(pattern) is not None


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Value of the first pattern that matches, as in PEFT."""
    return next((v for p, v in patterns.items() if matches(p, module)), default)
