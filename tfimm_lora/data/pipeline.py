"""Batches of normalised images for Keras, through tf.data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tfimm_lora.data.dataset import Images
from tfimm_lora.data.transforms import Resize

if TYPE_CHECKING:
    import tensorflow as tf


def training_batches(
    images: Images,
    resize: Resize,
    preprocess: Callable[[Any], Any],
    *,
    batch_size: int,
    seed: int = 0,
    flip: bool = False,
    shift: float = 0.0,
    cache_megabytes: int = 2048,
) -> tf.data.Dataset:
    """Returns shuffled, augmented batches; one pass of the dataset is one epoch.

    Args:
        images: The training images.
        resize: Brings a picture to the model's size.
        preprocess: Normalises values in [0, 255]; ``tfimm_lora.create_preprocessing``.
        batch_size: Images per batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation; the same seed gives the same batches.
        flip: Mirror at random. Defaults to False.
        shift: Move at random by up to that share of the side. Defaults to 0.
        cache_megabytes: Resized images are kept if they need no more memory than this.

    Returns:
        Dataset of (images, labels), float32 (batch, height, width, channels) and int64 (batch,).

    Example:
        >>> batches = training_batches(data.train, Resize(224, 224), prep, batch_size=32)
    """
    import tensorflow as tf

    dataset = _cached(images, resize, cache_megabytes)
    dataset = dataset.shuffle(min(len(images), 4096), seed=seed, reshuffle_each_iteration=True)
    # One seed per image: the result does not depend on which thread works on which image.
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip((dataset, seeds.batch(2)))
    dataset = dataset.map(
        lambda example, two: (_augmented(example[0], two, flip, shift), example[1]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return _batched(dataset, preprocess, batch_size)


def validation_batches(
    images: Images,
    resize: Resize,
    preprocess: Callable[[Any], Any],
    *,
    batch_size: int,
    cache_megabytes: int = 2048,
) -> tf.data.Dataset:
    """Returns batches in a fixed order, unaltered but for size and normalisation.

    Args:
        images: The validation images.
        resize: Brings a picture to the model's size.
        preprocess: Normalises values in [0, 255].
        batch_size: Images per batch; the last one may be smaller.
        cache_megabytes: Resized images are kept if they need no more memory than this.

    Returns:
        Dataset of (images, labels), as :func:`training_batches`.

    Example:
        >>> batches = validation_batches(data.val, Resize(224, 224), prep, batch_size=32)
    """
    return _batched(_cached(images, resize, cache_megabytes), preprocess, batch_size)


def _cached(images: Images, resize: Resize, megabytes: int) -> tf.data.Dataset:
    import tensorflow as tf

    shape = (resize.height, resize.width, resize.channels)

    def with_shape(picture: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.ensure_shape(picture, shape), label

    dataset = images.pictures(resize).map(with_shape)
    needed = len(images) * resize.height * resize.width * resize.channels
    return dataset.cache() if needed <= megabytes * 2**20 else dataset


def _augmented(picture: tf.Tensor, seed: tf.Tensor, flip: bool, shift: float) -> tf.Tensor:
    import tensorflow as tf

    if flip:
        picture = tf.image.stateless_random_flip_left_right(picture, seed)
    height, width, channels = picture.shape
    margins = (round(shift * height), round(shift * width))
    if any(margins):
        padding = [(margins[0],) * 2, (margins[1],) * 2, (0, 0)]
        picture = tf.pad(picture, padding, mode="SYMMETRIC")
        picture = tf.image.stateless_random_crop(picture, (height, width, channels), seed + 1)
    return picture


def _batched(
    dataset: tf.data.Dataset, preprocess: Callable[[Any], Any], batch_size: int
) -> tf.data.Dataset:
    import tensorflow as tf

    dataset = dataset.batch(batch_size)
    dataset = dataset.map(
        lambda pictures, labels: (preprocess(tf.cast(pictures, tf.float32)), labels)
    )
    return dataset.prefetch(tf.data.AUTOTUNE)
