"""Images in folders: one folder per class, with or without ``train`` and ``val`` above them."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.registry import suggest
from tfimm_lora.data.sources import register_source
from tfimm_lora.data.split import RandomAccessSplit, Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class FolderSplit(RandomAccessSplit):
    """Files of one split; ``items`` are paths."""

    def unreadable(self, indices: np.ndarray) -> dict[int, str]:
        """Decodes every image once and names those that fail."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            reasons = pool.map(lambda index: _reason_unreadable(self.items[index]), indices)
            return {
                int(index): f"{self.items[index]}: {reason}"
                for index, reason in zip(indices, reasons, strict=True)
                if reason
            }


@register_source("folder")
def open_folder(config: DataConfig, argument: str) -> Source:
    """Finds classes and images below a folder.

    Args:
        config: The ``data`` section of a recipe.
        argument: Path of the folder; ``~`` is expanded.

    Raises:
        DataError: The folder does not exist, has no classes or no images, or its validation
            images show a class that its training images lack.

    Example:
        >>> open_folder(DataConfig(), "flowers").class_names
        ('daisy', 'rose', 'tulip')
    """
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise DataError(_missing_folder(argument, root))
    train_folder = _split_folder(root, config.train_split, TRAIN_NAMES)
    val_folder = _split_folder(root, config.val_split, VAL_NAMES)
    if train_folder is None and val_folder is not None and config.val_split is None:
        # A class may well be called "test".
        val_folder = None
    if train_folder is None and val_folder is not None:
        raise DataError(
            f"{root} has {val_folder.name!r} but no folder of training images: "
            "name it with --data.train_split."
        )

    wanted = None if config.classes is None else {str(name) for name in config.classes}
    train_files, ignored = _files_by_class(train_folder or root, wanted)
    class_names = tuple(train_files)
    val_files: dict[str, list[Path]] = {}
    if val_folder is not None:
        val_files, also_ignored = _files_by_class(val_folder, wanted)
        ignored += also_ignored
        surplus = sorted(set(val_files) - set(class_names))
        if wanted is not None:
            surplus = sorted(wanted & set(surplus))
        if surplus:
            raise DataError(
                f"{val_folder} has {_count(len(surplus), 'class', 'classes')} that "
                f"{train_folder} lacks: {', '.join(surplus)}. Every class has to be in both; "
                "remove or rename these, or choose with --data.classes."
            )
    train_name = train_folder.name if train_folder else root.name
    notes = []
    if ignored:
        kinds = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in sorted(ignored.items()))
        notes.append(f"not images by their names, ignored: {kinds}")
    return Source(
        description=f"folder {root}",
        class_names=class_names,
        train=_make_split(train_name, class_names, train_files),
        val=_make_split(val_folder.name, class_names, val_files) if val_folder else None,
        notes=tuple(notes),
    )


def open_file(path: str | Path) -> Image.Image:
    """Opens and decodes an image file.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read; the message names it.

    Example:
        >>> open_file("rose.jpg").size
        (320, 240)
    """
    try:
        picture = Image.open(path)
        picture.load()
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise DataError(f"cannot read {path}: {error}") from error
    return picture


def _reason_unreadable(path: Path) -> str:
    try:
        open_file(path).close()
    except DataError as error:
        if path.stat().st_size == 0:
            return "the file is empty"
        return str(error.__cause__).replace(f" {str(path)!r}", "")
    return ""


def _missing_folder(argument: str, root: Path) -> str:
    if not argument:
        return "No folder given: type --data.source folder:PATH."
    if root.exists():
        return f"{argument} is a file; --data.source folder:PATH wants the folder of the images."
    siblings = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
    return (
        f"The folder {argument} does not exist (looked for {root.absolute()})."
        f"{suggest(root.name, siblings)}"
    )


def _split_folder(root: Path, asked: str | None, usual: tuple[str, ...]) -> Path | None:
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    if asked is not None:
        if asked not in folders:
            raise DataError(f"{root} has no folder {asked!r}.{suggest(asked, folders)}")
        return folders[asked]
    return next((folders[name] for name in usual if name in folders), None)


def _files_by_class(
    folder: Path, wanted: set[str] | None
) -> tuple[dict[str, list[Path]], Counter[str]]:
    """Returns the images of every class below a folder, and the other files by their suffix.

    Classes outside ``wanted`` (``None``: all are wanted) may be empty.
    """
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not classes:
        loose = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        found = f"{_count(loose, 'image', 'images')} but no folders" if loose else "nothing"
        raise DataError(
            f"{folder} holds {found}; expected one folder per class with that class's images."
        )
    found_files: dict[str, list[Path]] = {}
    ignored: Counter[str] = Counter()
    for path in classes:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in files if not file.name.startswith(".")]
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        ignored.update(
            file.suffix.lower() for file in files if file.suffix.lower() not in IMAGE_SUFFIXES
        )
        found_files[path.name] = images
    empty = [name for name, files in found_files.items() if not files]
    if wanted is not None and len(empty) < len(found_files):
        empty = [name for name in empty if name in wanted]
    if len(empty) == len(found_files):
        raise DataError(
            f"{folder} has no images in its {_count(len(empty), 'folder', 'folders')} "
            f"({', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}). "
            f"Images are files ending in {' '.join(IMAGE_SUFFIXES)}."
        )
    if empty:
        raise DataError(
            f"{folder} has {_count(len(empty), 'class', 'classes')} without images: "
            f"{', '.join(empty)}. Add images, remove the folder, or choose with --data.classes."
        )
    return found_files, ignored


def _make_split(
    name: str, class_names: tuple[str, ...], files: dict[str, list[Path]]
) -> FolderSplit:
    labels = [np.full(len(files.get(c, ())), i) for i, c in enumerate(class_names)]
    return FolderSplit(
        name=name,
        labels=np.concatenate(labels).astype(np.int64),
        items=[path for c in class_names for path in files.get(c, ())],
        open_picture=open_file,
    )


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
