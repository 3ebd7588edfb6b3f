"""What a run's images are: the ``data`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from tfimm_lora.data.errors import DataError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are split.

    Args:
        source: ``folder:PATH``, ``tfds:NAME`` or ``digits``. A folder holds one folder per class,
            or ``train`` and ``val`` (or ``validation``, ``test``) with one folder per class each.
        classes: Names of the classes to use; all of them by default.
        train_images_per_class: At most that many training images of each class, drawn with
            ``seed``; all of them by default.
        val_fraction: Share of each class that is kept for validation where the source has no
            validation split. Defaults to 0.2 or, with ``train_images_per_class``, to all other
            images.
        seed: Seed of the split and of the drawing.
        skip_unreadable: Leave out images that cannot be read, instead of stopping.
        flip: Mirror training images at random. By default as the source says: photographs yes,
            digits no.
        shift: Move training images at random by up to that share of their side.
        train_split: Name of the split or subfolder to train on, where it has to be said.
        val_split: Name of the split or subfolder to validate on, where it has to be said.
        data_dir: Folder of TensorFlow Datasets' prepared data sets.
        cache_megabytes: Prepared images are kept in memory as long as they need no more than this.

    Raises:
        DataError: A value makes no sense.

    Example:
        >>> DataConfig(source="folder:flowers", val_fraction=0.25)
    """

    source: str | None = None
    classes: list[str | int] | None = None
    train_images_per_class: int | None = None
    val_fraction: float | None = None
    seed: int = 0
    skip_unreadable: bool = False
    flip: bool | None = None
    shift: float = 0.1
    train_split: str | None = None
    val_split: str | None = None
    data_dir: str | None = None
    cache_megabytes: int = 2048

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise DataError(
                f"data.val_fraction has to lie between 0 and 1, found {self.val_fraction}."
            )
        if self.train_images_per_class is not None and self.train_images_per_class < 1:
            raise DataError(
                "data.train_images_per_class has to be 1 or more, found "
                f"{self.train_images_per_class}."
            )
        if not 0 <= self.shift < 0.5:
            raise DataError(f"data.shift has to be at least 0 and below 0.5, found {self.shift}.")
