"""The error of everything that can be wrong with a user's images."""

from __future__ import annotations


class DataError(ValueError):
    """Images, labels or folders are not what training needs; the message says what to do.

    Example:
        >>> raise DataError("folder 'cats' has no images")
    """
