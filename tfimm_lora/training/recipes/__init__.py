"""Recipes that come with the package; ``digits.yaml`` is what ``tfimm-lora train`` runs alone."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def recipe_path(name: str) -> Path:
    """Returns the file of an embedded recipe.

    Args:
        name: Its name without suffix.

    Example:
        >>> recipe_path("digits").name
        'digits.yaml'
    """
    return Path(str(resources.files("tfimm_lora.training.recipes").joinpath(f"{name}.yaml")))
