"""Files and folders that are complete or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfimm_lora.training.errors import RecipeError
from tfimm_lora.weights.safetensors_file import write_aside


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file; whoever reads it sees the old one or the whole new one.

    Args:
        path: The file.
        text: Its content.

    Example:
        >>> write_text("metrics.json", "{}")
    """
    write_aside(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an unfinished folder to fill, which is renamed to ``path`` at the end.

    If the block fails the unfinished folder is removed. A killed process leaves it behind, under
    a hidden name; ``path`` itself never holds half of a result.

    Args:
        path: The folder to be; its parents are made.

    Raises:
        RecipeError: ``path`` exists and is not an empty folder.

    Example:
        >>> with new_folder("runs/first") as folder:
        ...     write_text(folder / "metrics.json", "{}")
    """
    path = Path(path)
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    unfinished.chmod(0o777 & ~_umask())  # mkdtemp's own are for the owner alone
    try:
        yield unfinished
        require_free(path)
        os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def require_free(path: str | Path) -> None:
    """Raises if something is in the way of a new folder.

    Raises:
        RecipeError: ``path`` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(
            f"The output {path} exists already; name another with --output, or remove it."
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
