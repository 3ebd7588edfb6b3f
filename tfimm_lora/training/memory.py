"""Resident memory of this process, in megabytes (2**20 bytes)."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_megabytes() -> float | None:
    """Returns the largest resident memory since this process began, ``None`` if unknown.

    Linux counts it for the program that runs now (``VmHWM``). ``getrusage``, used elsewhere,
    inherits the parent's peak on Linux, and on Windows there is neither.

    Example:
        >>> peak_megabytes()
        812.4
    """
    peak = _from_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_megabytes() -> float | None:
    """Returns the resident memory now, ``None`` where the system does not tell.

    Example:
        >>> resident_megabytes()
        640.2
    """
    return _from_status("VmRSS")


def _from_status(key: str) -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None
