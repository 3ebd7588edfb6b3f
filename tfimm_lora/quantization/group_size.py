"""How many rows of a kernel share a scale."""

from __future__ import annotations


def check_group_size(group_size: int | None, field: str = "group_size") -> None:
    """Raises unless a group size is a positive integer or ``None``.

    Raises:
        ValueError: It is not.
    """
    valid = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size >= 1
    if group_size is not None and not valid:
        raise ValueError(
            f"{field} has to be an integer of at least 1, or None for one scale per output, found "
            f"{group_size!r}."
        )


def divisors(rows: int) -> list[int]:
    """All divisors of a number, in order."""
    return [n for n in range(1, rows + 1) if rows % n == 0]


def divides(group_size: int, rows: int) -> bool:
    """Whether groups of a size cover rows exactly; larger ones are one group of all rows."""
    return group_size >= rows or rows % group_size == 0


def fitted_group_size(group_size: int, rows: int) -> int:
    """The divisor of the rows that is nearest to a group size, as a ratio.

    Args:
        group_size: The size wanted.
        rows: Rows of the kernel's matrix.

    Example:
        >>> fitted_group_size(64, 588)
        49
    """
    return min(divisors(rows), key=lambda n: max(n / group_size, group_size / n))
