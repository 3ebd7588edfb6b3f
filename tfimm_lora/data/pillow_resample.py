"""Pillow's resampling in TensorFlow operations, for ``tf.data``.

Pillow resizes one side, rounds to bytes, then resizes the other and rounds again. Weights are
whole numbers in units of 2^-22 and sums are 32-bit integers. With the same integers the bytes are
the same; what is left to chance is the last bit of a sine in two of the filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import PIL

if TYPE_CHECKING:
    import tensorflow as tf

PRECISION_BITS = 22
# From version 13 on Pillow begins with the height where it shrinks much more than the width.
HEIGHT_MAY_BE_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def _triangle(x: Any, tf: Any) -> Any:
    return tf.maximum(1 - tf.abs(x), 0)


def _box(x: Any, tf: Any) -> Any:
    return tf.cast((x > -0.5) & (x <= 0.5), x.dtype)


def _cubic(x: Any, tf: Any) -> Any:
    a, x = -0.5, tf.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return tf.where(x < 1, near, tf.where(x < 2, far, tf.zeros_like(x)))


def _sinc(x: Any, tf: Any) -> Any:
    x = x * math.pi
    return tf.where(x == 0, tf.ones_like(x), tf.sin(x) / tf.where(x == 0, tf.ones_like(x), x))


def _hamming(x: Any, tf: Any) -> Any:
    x = tf.abs(x)
    inside = _sinc(x, tf) * (0.54 + 0.46 * tf.cos(x * math.pi))
    return tf.where(x < 1, inside, tf.zeros_like(x))


def _lanczos(x: Any, tf: Any) -> Any:
    return tf.where((x >= -3) & (x < 3), _sinc(x, tf) * _sinc(x / 3, tf), tf.zeros_like(x))


# Name to half the filter's width at full size, and the filter.
FILTERS: dict[str, tuple[float, Callable[[Any, Any], Any]]] = {
    "bilinear": (1.0, _triangle),
    "box": (0.5, _box),
    "bicubic": (2.0, _cubic),
    "hamming": (1.0, _hamming),
    "lanczos": (3.0, _lanczos),
}
INTERPOLATIONS = ("nearest", *FILTERS)


def resize(picture: tf.Tensor, height: tf.Tensor, width: tf.Tensor, interpolation: str) -> Any:
    """Resizes a picture as ``PIL.Image.resize`` does.

    Args:
        picture: Tensor of shape (h, w, channels), uint8.
        height: Height of the result, int32 scalar.
        width: Width of the result, int32 scalar.
        interpolation: ``nearest``, ``bilinear``, ``box``, ``bicubic``, ``hamming`` or ``lanczos``.

    Returns:
        Tensor of shape (height, width, channels), uint8.

    Example:
        >>> resize(tf.zeros((4, 6, 3), "uint8"), 2, 3, "bicubic").shape
        TensorShape([2, 3, 3])
    """
    import tensorflow as tf

    rows, columns = tf.shape(picture)[0], tf.shape(picture)[1]
    if interpolation == "nearest":
        picture = tf.gather(picture, _nearest(rows, height), axis=0)
        return tf.gather(picture, _nearest(columns, width), axis=1)

    def width_first() -> tf.Tensor:
        return resize_side(resize_side(picture, 1, width), 0, height)

    def height_first() -> tf.Tensor:
        return resize_side(resize_side(picture, 0, height), 1, width)

    def resize_side(x: tf.Tensor, axis: int, new_size: tf.Tensor) -> tf.Tensor:
        if axis == 0:
            return _resize_rows(x, new_size, interpolation)
        turned = _resize_rows(tf.transpose(x, (1, 0, 2)), new_size, interpolation)
        return tf.transpose(turned, (1, 0, 2))

    if not HEIGHT_MAY_BE_FIRST:
        return width_first()
    lost_rows, lost_columns = rows - height, columns - width
    much = (lost_rows > 0) & (lost_rows > 2 * lost_columns)
    return tf.cond(much, height_first, width_first)


def _nearest(size: tf.Tensor, new_size: tf.Tensor) -> tf.Tensor:
    """The pixel that each new pixel is taken from."""
    import tensorflow as tf

    scale = tf.cast(size, tf.float64) / tf.cast(new_size, tf.float64)
    # Pillow adds the scale again and again; a product would round differently.
    steps = tf.concat([[scale * 0.5], tf.fill([new_size - 1], scale)], 0)
    return tf.minimum(tf.cast(tf.cumsum(steps), tf.int32), size - 1)


def _resize_rows(picture: tf.Tensor, new_size: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Resizes the first axis of a picture and rounds to bytes."""
    import tensorflow as tf

    shape = tf.shape(picture)
    weights = _weights(shape[0], new_size, interpolation)
    flat = tf.cast(tf.reshape(picture, (shape[0], shape[1] * shape[2])), tf.int32)
    sums = tf.sparse.sparse_dense_matmul(weights, flat) + (1 << (PRECISION_BITS - 1))
    values = tf.clip_by_value(tf.bitwise.right_shift(sums, PRECISION_BITS), 0, 255)
    values = tf.reshape(values, (new_size, shape[1], shape[2]))
    return tf.cast(tf.ensure_shape(values, (None, None, picture.shape[2])), tf.uint8)


def _weights(size: tf.Tensor, new_size: tf.Tensor, interpolation: str) -> tf.SparseTensor:
    """Matrix (new_size, size) that takes old pixels to new ones, int32 in units of 2^-22."""
    import tensorflow as tf

    support, function = FILTERS[interpolation]
    old, new = tf.cast(size, tf.float64), tf.cast(new_size, tf.float64)
    scale = old / new
    stretch = tf.maximum(scale, 1.0)  # when a picture shrinks the filter widens: antialiasing
    reach = support * stretch
    middle = (tf.range(new, dtype=tf.float64) + 0.5) * scale
    first = tf.maximum(tf.floor(middle - reach + 0.5), 0)
    count = tf.minimum(tf.floor(middle + reach + 0.5), old) - first
    tap = tf.range(tf.math.ceil(reach) * 2 + 1, dtype=tf.float64)
    pixel = first[:, None] + tap
    weights = function((pixel - middle[:, None] + 0.5) * (1 / stretch), tf)
    weights = tf.where(tap < count[:, None], weights, tf.zeros_like(weights))
    weights = weights / tf.reduce_sum(weights, axis=1, keepdims=True)
    units = weights * (1 << PRECISION_BITS)
    units = tf.cast(units + 0.5 * tf.sign(units), tf.int32)  # a cast cuts towards 0

    new_pixel = tf.broadcast_to(tf.range(new, dtype=tf.float64)[:, None], tf.shape(units))
    pixel = tf.minimum(pixel, old - 1)  # beyond the end the weight is 0
    indices = tf.cast(tf.stack([new_pixel, pixel], axis=-1), tf.int64)
    return tf.SparseTensor(
        tf.reshape(indices, (-1, 2)),
        tf.reshape(units, (-1,)),
        tf.cast(tf.stack([new_size, size]), tf.int64),
    )
