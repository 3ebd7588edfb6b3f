"""The error of a recipe that makes no sense."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe lacks something or contradicts itself; the message says what to type.

    Example:
        >>> raise RecipeError("no model given: use --model.name")
    """
