"""The formats by name."""

from __future__ import annotations

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.quantization.format import KernelFormat
from tfimm_lora.quantization.group_size import check_group_size
from tfimm_lora.quantization.integer import FAKE_FORMATS, INTEGER_FORMATS
from tfimm_lora.quantization.nf4 import NF4
from tfimm_lora.quantization.row_scaled import ROW_SCALED

FORMATS: dict[str, KernelFormat] = {
    format.name: format for format in (*FAKE_FORMATS, *INTEGER_FORMATS, NF4(), *ROW_SCALED.values())
}
"""The formats by name. A format of your own is added here."""


def kernel_format(name: str | None, field: str = "format") -> KernelFormat | None:
    """The format of a name; ``None`` stands for float.

    Args:
        name: Name of the format.
        field: What to call it in a message.

    Raises:
        ValueError: There is no such format.

    Example:
        >>> kernel_format("int4").bits
        4
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(
            f"Unknown {field} {name!r}.{nearest_names(str(name), FORMATS)} Use None for float or "
            f"one of {', '.join(FORMATS)}."
        )
    return FORMATS[name]


def split_group_size(
    text: str | None, group_size: int | None = None, field: str = "format"
) -> tuple[str | None, int | None]:
    """Takes ``int4/64``, as Keras writes it in dtype policies, apart.

    Args:
        text: Name of a format, perhaps with a group size.
        group_size: Group size where the text has none.
        field: What to call it in a message.

    Returns:
        The format's name and the group size; that of float is ``None``.

    Raises:
        ValueError: The format is unknown or the group size no positive integer.

    Example:
        >>> split_group_size("int4/64")
        ('int4', 64)
    """
    if isinstance(text, str) and "/" in text:
        text, _, size = text.partition("/")
        group_size = int(size) if size.isdecimal() else size  # type: ignore[assignment]
    check_group_size(group_size, f"the group size of {field}")
    found = kernel_format(text, field)
    return (None, None) if found is None else (found.name, group_size)
