"""The table of data sources: ``folder:PATH``, ``tfds:NAME``, ``digits`` and users' own."""

from __future__ import annotations

from collections.abc import Callable

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.registry import Registry
from tfimm_lora.data.split import Source

SOURCES: Registry[Callable[[DataConfig, str], Source]] = Registry("data source")
"""Name to a function of the data configuration and of what follows the colon."""

register_source = SOURCES.register
"""Decorator that registers a source, ``@register_source("digits")``."""


def open_source(config: DataConfig) -> Source:
    """Opens the source that a data configuration names.

    Args:
        config: The ``data`` section of a recipe.

    Returns:
        The source, with its labels read and its images unread.

    Raises:
        DataError: There is no such source, or what it finds cannot be used.

    Example:
        >>> open_source(DataConfig(source="digits")).class_names[:3]
        ('0', '1', '2')
    """
    # Imported for their registration.
    import tfimm_lora.data.digits
    import tfimm_lora.data.folder
    import tfimm_lora.data.tfds  # noqa: F401

    if not config.source:
        raise DataError("No images given: use --data.source folder:PATH, tfds:NAME or digits.")
    name, _, argument = config.source.partition(":")
    try:
        factory = SOURCES[name]
    except ValueError as error:
        raise DataError(
            f"{error} Type --data.source folder:PATH, tfds:NAME or digits, found {config.source!r}."
        ) from None
    return factory(config, argument)
