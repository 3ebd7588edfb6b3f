"""Sizes of resized pictures as timm computes them, in Python's numbers or in TensorFlow's.

``xp`` is ``numpy`` or ``tensorflow``: sizes inside ``tf.data`` are known only when it runs.
"""

from __future__ import annotations

from typing import Any

CROP_MODES = ("center", "squash", "border")


def resized_size(
    height: Any, width: Any, target: tuple[int, int], crop_pct: float, crop_mode: str, xp: Any
) -> tuple[Any, Any]:
    """Returns the size to which a picture is resized before its centre is cut out.

    Args:
        height: Height of the picture, float64.
        width: Width of the picture, float64.
        target: Height and width of the result.
        crop_pct: Side of the result over the side of the resized picture.
        crop_mode: ``center``, ``squash`` or ``border``.
        xp: The library of the numbers, ``numpy`` or ``tensorflow``.

    Returns:
        Height and width of the resized picture, whole numbers in float64.

    Example:
        >>> resized_size(np.float64(333), np.float64(500), (224, 224), 0.875, "center", np)
        (256.0, 384.0)
    """
    rows, columns = (max(1, int(side / crop_pct)) for side in target)
    if crop_mode == "squash":
        return rows + 0 * height, columns + 0 * width
    if crop_mode == "center" and rows == columns:
        # The short side is hit exactly, the long side is cut to a whole number: torchvision's rule.
        shorter = xp.minimum(height, width)
        return xp.floor(rows * height / shorter), xp.floor(columns * width / shorter)
    nearest = xp.minimum if crop_mode == "center" else xp.maximum
    ratio = nearest(height / rows, width / columns)
    # Rounded half to even, by all three alike. timm fails where a side becomes 0.
    return xp.maximum(xp.round(height / ratio), 1.0), xp.maximum(xp.round(width / ratio), 1.0)


def centre(size: Any, wanted: int, xp: Any) -> tuple[Any, Any]:
    """Returns where to cut, and how much to pad in front, to bring a side to ``wanted`` pixels.

    Args:
        size: Pixels of the side, a whole number in float64.
        wanted: Pixels of the result.
        xp: The library of the numbers, ``numpy`` or ``tensorflow``.

    Returns:
        First pixel to keep and number of pixels to put in front; one of them is 0.

    Example:
        >>> centre(np.float64(9), 4, np), centre(np.float64(3), 4, np)
        ((2.0, 0.0), (0.0, 0.0))
    """
    surplus = size - wanted
    start = xp.round(xp.maximum(surplus, 0.0) / 2)
    return start, xp.floor(xp.maximum(-surplus, 0.0) / 2)
