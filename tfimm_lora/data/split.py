"""One split of a data source: labels at hand, images read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf
    from PIL import Image

Prepare = Callable[["Image.Image"], np.ndarray]
"""Turns a picture into an array of fixed shape (height, width, channels), uint8."""


@dataclass(frozen=True)
class Split:
    """Images with their labels, in a fixed order.

    Attributes:
        name: What the source calls it, for messages.
        labels: Index of each image's class, shape (images,), int64.

    Subclasses say how images are read.
    """

    name: str
    labels: np.ndarray

    def pictures(self, indices: np.ndarray, prepare: Prepare) -> tf.data.Dataset:
        """Returns a dataset of (prepared picture, label) of the images at ``indices``.

        Args:
            indices: Which images, shape (n,), ascending.
            prepare: Makes a uint8 array of a picture.
        """
        raise NotImplementedError

    def unreadable(self, indices: np.ndarray) -> dict[int, str]:
        """Returns the images that cannot be read: index to a line that names file and reason."""
        return {}


@dataclass(frozen=True)
class RandomAccessSplit(Split):
    """A split whose images can be opened one by one.

    Attributes:
        items: Whatever names an image: paths, arrays.
        open_picture: Opens one item as a picture.
    """

    items: Sequence[Any]
    open_picture: Callable[[Any], Image.Image]

    def pictures(self, indices: np.ndarray, prepare: Prepare) -> tf.data.Dataset:
        """Returns a dataset of (prepared picture, label); see :class:`Split`."""
        import tensorflow as tf

        def read(index: np.ndarray) -> np.ndarray:
            return prepare(self.open_picture(self.items[int(index)]))

        dataset = tf.data.Dataset.from_tensor_slices((indices, self.labels[indices]))
        return dataset.map(
            lambda index, label: (tf.numpy_function(read, [index], tf.uint8), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )


@dataclass(frozen=True)
class Source:
    """What a data source offers.

    Attributes:
        description: One line for the summary.
        class_names: Names of the classes; labels index into it.
        train: Images to train on (or to divide, if there is no ``val``).
        val: Images to validate on, ``None`` if the source has none.
        flip: Whether mirrored images still show the same thing.
        notes: Lines for the summary: what was ignored, and the like.
    """

    description: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None = None
    flip: bool = True
    notes: tuple[str, ...] = ()
