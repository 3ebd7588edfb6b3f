"""The images of a run: classes chosen, unreadable images found, training and validation divided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.registry import suggest
from tfimm_lora.data.sources import open_source
from tfimm_lora.data.split import Prepare, Source, Split

if TYPE_CHECKING:
    import tensorflow as tf

DEFAULT_VAL_FRACTION = 0.2
NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Images:
    """Chosen images of one split, with labels that count the chosen classes.

    Attributes:
        split: Where the images are read from.
        indices: Their places in the split, shape (n,), ascending.
        labels: Their classes, shape (n,), int64, indexing :attr:`Dataset.class_names`.
        class_of_label: The split's label to ours.
    """

    split: Split
    indices: np.ndarray
    labels: np.ndarray
    class_of_label: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def pictures(self, prepare: Prepare) -> tf.data.Dataset:
        """Returns a ``tf.data.Dataset`` of (prepared picture, label) in a fixed order."""
        import tensorflow as tf

        dataset = self.split.pictures(self.indices, prepare)
        table = tf.constant(self.class_of_label)
        dataset = dataset.map(lambda picture, label: (picture, tf.gather(table, label)))
        return dataset.apply(tf.data.experimental.assert_cardinality(len(self)))


@dataclass(frozen=True)
class Dataset:
    """What a run trains and validates on.

    Attributes:
        description: One line that names the source.
        class_names: The classes; labels index into it.
        train: Training images.
        val: Validation images.
        flip: Whether mirrored images still show the same thing.
        skipped: The unreadable images that were left out, one line each.
        notes: Further lines for the summary.
    """

    description: str
    class_names: tuple[str, ...]
    train: Images
    val: Images
    flip: bool
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Returns what was found, in a few lines for a person.

        Example:
            >>> print(load_dataset(DataConfig(source="digits")).summary())
        """
        train, val = (np.bincount(i.labels, minlength=len(self.class_names)) for i in self.images)
        lines = [
            f"data     {self.description}",
            f"classes  {len(self.class_names)}: {_shortened(self.class_names)}",
            f"images   {len(self.train)} to train on ({_per_class(train)}), "
            f"{len(self.val)} to validate on ({_per_class(val)})",
        ]
        lines += [f"note     {note}" for note in self.notes]
        if self.skipped:
            lines.append(f"skipped  {len(self.skipped)} unreadable: {_listed(self.skipped)}")
        return "\n".join(lines)

    @property
    def images(self) -> tuple[Images, Images]:
        """Training and validation images."""
        return self.train, self.val


def load_dataset(config: DataConfig, *, check: bool = True) -> Dataset:
    """Opens a source, chooses classes and images, and divides them.

    The same configuration always gives the same images.

    Args:
        config: The ``data`` section of a recipe.
        check: Decode every image file once to find unreadable ones. Defaults to True.

    Returns:
        The images of the run.

    Raises:
        DataError: The source is unusable, an asked class does not exist, fewer than two classes
            are left, a class has too few images, or images are unreadable.

    Example:
        >>> dataset = load_dataset(DataConfig(source="digits", classes=["6", "7"]))
    """
    source = open_source(config)
    class_names = _chosen_classes(source, config)
    class_of_label = np.full(len(source.class_names), -1)
    for index, name in enumerate(class_names):
        class_of_label[source.class_names.index(name)] = index

    train, train_bad = _readable(source.train, class_of_label, check)
    val, val_bad = _readable(source.val, class_of_label, check) if source.val else (None, [])
    skipped = train_bad + val_bad
    if skipped and not config.skip_unreadable:
        raise DataError(
            f"{len(skipped)} of the images cannot be read: {_listed(skipped)}. Repair or remove "
            "them, or leave them out with --data.skip_unreadable true."
        )
    _require_images(source.train, train, class_of_label, class_names, 1 if source.val else 2)
    if source.val is None:
        train, val = _divided(train, class_of_label[source.train.labels], config)
    elif config.train_images_per_class:
        train = _drawn(train, class_of_label[source.train.labels], config)
    assert val is not None
    if not len(val):
        raise DataError(
            f"No validation images of {_shortened(class_names)} in {source.description}."
        )
    return Dataset(
        description=source.description,
        class_names=class_names,
        train=_images(source.train, train, class_of_label),
        val=_images(source.val or source.train, val, class_of_label),
        flip=source.flip if config.flip is None else config.flip,
        skipped=tuple(skipped),
        notes=source.notes,
    )


def _chosen_classes(source: Source, config: DataConfig) -> tuple[str, ...]:
    class_names = source.class_names
    if config.classes is not None:
        asked = [str(name) for name in config.classes]
        for name in asked:
            if name not in class_names:
                raise DataError(
                    f"{source.description} has no class {name!r}.{suggest(name, class_names)} "
                    f"Its classes: {_shortened(class_names)}."
                )
        class_names = tuple(dict.fromkeys(asked))
    if len(class_names) < 2:
        raise DataError(
            f"{source.description} has one class only ({class_names[0]}); a classifier needs two "
            "or more."
        )
    return class_names


def _readable(
    split: Split, class_of_label: np.ndarray, check: bool
) -> tuple[np.ndarray, list[str]]:
    indices = np.flatnonzero(class_of_label[split.labels] >= 0)
    bad = split.unreadable(indices) if check else {}
    return np.setdiff1d(indices, list(bad)), list(bad.values())


def _require_images(
    split: Split,
    indices: np.ndarray,
    class_of_label: np.ndarray,
    class_names: tuple[str, ...],
    least: int,
) -> None:
    counts = np.bincount(class_of_label[split.labels[indices]], minlength=len(class_names))
    poor = [f"{name} ({n})" for name, n in zip(class_names, counts, strict=True) if n < least]
    if poor:
        reason = "one to train on and one to validate on" if least == 2 else "one to train on"
        raise DataError(
            f"Too few readable images of {', '.join(poor)} in {split.name!r}: every class needs "
            f"{reason}."
        )


def _divided(
    indices: np.ndarray, classes: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Divides every class by itself, so that both parts have the same share of each."""
    generator = np.random.default_rng(config.seed)
    train, val = [], []
    for label in np.unique(classes[indices]):
        shuffled = generator.permutation(indices[classes[indices] == label])
        if config.val_fraction is None and config.train_images_per_class:
            kept = min(config.train_images_per_class, len(shuffled) - 1)
        else:
            fraction = config.val_fraction or DEFAULT_VAL_FRACTION
            kept = len(shuffled) - min(max(round(fraction * len(shuffled)), 1), len(shuffled) - 1)
        train.append(shuffled[: min(kept, config.train_images_per_class or kept)])
        val.append(shuffled[kept:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def _drawn(indices: np.ndarray, classes: np.ndarray, config: DataConfig) -> np.ndarray:
    generator = np.random.default_rng(config.seed)
    drawn = [
        generator.permutation(indices[classes[indices] == label])[: config.train_images_per_class]
        for label in np.unique(classes[indices])
    ]
    return np.sort(np.concatenate(drawn))


def _images(split: Split, indices: np.ndarray, class_of_label: np.ndarray) -> Images:
    return Images(split, indices, class_of_label[split.labels[indices]], class_of_label)


def _per_class(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low} per class" if low == high else f"{low} to {high} per class"


def _shortened(names: Iterable[str], at_most: int = NAMED_AT_MOST) -> str:
    names = list(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _listed(lines: Iterable[str]) -> str:
    return _shortened(lines).replace(", ", "; ")
