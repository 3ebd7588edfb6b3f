"""What a transform is given: a picture, an array or a TensorFlow tensor, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tfimm_lora.data.errors import DataError


def is_tensorflow(image: Any) -> bool:
    """Whether something is a tensor of TensorFlow's, without importing TensorFlow.

    Example:
        >>> is_tensorflow(np.zeros(3))
        False
    """
    return any(
        cls.__module__.partition(".")[0] == "tensorflow" and cls.__name__ == "Tensor"
        for cls in type(image).__mro__
    )


def as_bytes(image: Any) -> np.ndarray:
    """Returns an array of shape (h, w, channels), uint8, or says why something is not one.

    Raises:
        DataError: It is a batch, or its values are not bytes.

    Example:
        >>> as_bytes(np.zeros((4, 6), "uint8")).shape
        (4, 6, 1)
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    check_image(array.shape, str(array.dtype))
    return array


def as_picture(array: np.ndarray) -> Image.Image:
    """Returns an array of shape (h, w, channels), uint8, as picture.

    Raises:
        DataError: Pictures do not have that number of channels.

    Example:
        >>> as_picture(np.zeros((4, 6, 3), "uint8")).size
        (6, 4)
    """
    if array.shape[2] not in (1, 3, 4):
        raise DataError(f"The array has {array.shape[2]} channels; pictures have 1, 3 or 4.")
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_image_tensor(image: Any, channels: int) -> Any:
    """Returns a tensor of shape (h, w, channels), uint8, or says why something is not one.

    A grey image is repeated for models of more channels.

    Args:
        image: Tensor; its shape may be unknown.
        channels: Number of channels that the model wants.

    Raises:
        DataError: It is a batch, its values are not bytes, or it has other channels.

    Example:
        >>> as_image_tensor(tf.zeros((4, 6, 1), "uint8"), 3).shape
        TensorShape([4, 6, 3])
    """
    import tensorflow as tf

    if image.shape.rank == 2:
        image = image[..., None]
    check_image((0, 0, 0) if image.shape.rank is None else tuple(image.shape), image.dtype.name)
    if image.shape.rank == 3 and image.shape[2] == 1 and channels != 1:
        return tf.repeat(image, channels, axis=2)
    if image.shape.rank == 3 and image.shape[2] not in (None, channels):
        raise DataError(
            f"The tensor has {image.shape[2]} channels, and the model wants {channels}: decode "
            f"images with channels={channels}."
        )
    return tf.ensure_shape(image, (None, None, channels))


def check_image(shape: tuple[int | None, ...], dtype: str) -> None:
    """Checks that something is one image of bytes.

    Raises:
        DataError: It is not.

    Example:
        >>> check_image((4, 6, 3), "uint8")
    """
    if len(shape) == 4:
        raise DataError(
            f"This is a batch, of shape {shape}; a transform takes one image at a time, because "
            "their sizes differ: map it before dataset.batch."
        )
    if len(shape) != 3:
        raise DataError(f"An image has the shape (h, w, channels), not {shape}.")
    if dtype != "uint8":
        raise DataError(
            f"The values of the image are {dtype}; a transform takes uint8, 0 to 255, as images "
            "are decoded. tfimm_lora.create_preprocessing normalises other numbers."
        )
