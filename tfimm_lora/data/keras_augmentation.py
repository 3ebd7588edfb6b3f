"""Keras' augmentation layers as functions of images and a seed.

A Keras layer draws from a generator that lives in the layer, so what an image gets depends on how
many images came before, and under ``num_parallel_calls`` on the threads. Here the seed comes with
the images, and the layer draws from that seed alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any


def seed_generator(seed: int | None) -> Any:
    """Makes a generator of seeds that works inside ``tf.data``.

    Args:
        seed: Where its sequence begins; ``None`` takes a number from Python's ``random``, which
            ``keras.utils.set_random_seed`` settles.

    Returns:
        A ``tf.random.Generator``.

    Example:
        >>> seed = seed_generator(0).make_seeds(1)[:, 0]
    """
    import tensorflow as tf

    seed = random.randrange(2**31) if seed is None else seed
    with tf.init_scope(), tf.device("CPU:0"):  # where tf.data runs
        return tf.random.Generator.from_seed(seed, alg="philox")


def stateless(layer_class: Any, **options: Any) -> Callable[[Any, Any], Any]:
    """Makes an augmentation layer whose randomness is an argument.

    Args:
        layer_class: A layer of Keras that augments images, such as ``keras.layers.RandAugment``.
        options: Arguments of its constructor.

    Returns:
        A function of the layer's input and a seed of shape (2,), for use in TensorFlow graphs
        (``dataset.map``, ``tf.function``), whatever Keras' backend is.

    Example:
        >>> erase = stateless(keras.layers.RandomErasing, factor=(0.5, 0.5))
        >>> dataset.map(lambda image: erase(image, [1, 2]))
    """
    import keras
    import tensorflow as tf

    class Seeds(keras.random.SeedGenerator):
        """A sequence of seeds that begins anew for every image."""

        def __init__(self) -> None:  # without the variable of the base class
            self.seed: Any = None
            self.draws = 0

        def next(self, ordered: bool = True) -> Any:
            self.draws += 1
            return tf.random.experimental.stateless_fold_in(self.seed, self.draws)

    seeds = Seeds()
    tracing = threading.Lock()

    class Layer(layer_class):
        def _get_seed_generator(self, backend: Any = None) -> Any:
            return seeds

    # The dtype is said because a global policy of float16 would round pixel values.
    layer = Layer(dtype="float32", name=layer_class.__name__, **options)

    def apply(images: Any, seed: Any) -> Any:
        with tracing:
            seeds.seed, seeds.draws = seed, 0
            return layer(images, training=True)

    return apply


def rand_augment(num_ops: int, strength: float) -> Callable[[Any, Any], Any]:
    """Makes ``keras.layers.RandAugment`` with timm's ranges for moves and brightness.

    Keras would turn an image by up to ``strength`` of a full circle. As in timm, at strength 1
    rotation is up to 30 degrees, shear up to 0.3, translation up to 0.45 of a side, and brightness
    changes by up to 0.9 of a middle grey. All other operations are Keras' own. Only the operations
    that were drawn are computed, where Keras computes all eleven and throws the others away.

    Args:
        num_ops: Operations per image.
        strength: 0 to 1.

    Returns:
        A function of an image, float32 in [0, 255], and a seed of shape (2,).

    Example:
        >>> augment = rand_augment(2, 0.9)
    """
    import keras
    import tensorflow as tf

    class Equalization(keras.layers.Equalization):
        def _custom_histogram_fixed_width(self, values: Any, value_range: Any, nbins: int) -> Any:
            # With JAX as backend Keras counts every value one by one, inside tf.data too.
            levels = tf.cast(tf.clip_by_value(tf.reshape(values, (-1,)), 0, nbins - 1), tf.int32)
            return tf.math.bincount(levels, minlength=nbins)

    class TimmRandAugment(keras.layers.RandAugment):
        def __init__(self, **options: Any) -> None:
            super().__init__(num_ops=num_ops, factor=strength, **options)
            layers, dtype = keras.layers, self.dtype_policy
            self.random_shear = layers.RandomShear(0.3 * strength, 0.3 * strength, dtype=dtype)
            self.random_translation = layers.RandomTranslation(
                0.45 * strength, 0.45 * strength, dtype=dtype
            )
            self.random_rotation = layers.RandomRotation(strength * 30 / 360, dtype=dtype)
            self.random_brightness = layers.RandomBrightness(0.45 * strength, dtype=dtype)
            self.equalization = Equalization(dtype=dtype)

        def transform_images(self, images: Any, transformation: Any, training: bool = True) -> Any:
            def operation(name: str, values: Any, x: Any) -> Callable[[], Any]:
                layer = getattr(self, name)
                return lambda: tf.ensure_shape(layer.transform_images(x, values), x.shape)

            for i in range(num_ops):
                transforms = transformation["transforms"].items()
                choices = [operation(name, values, images) for name, values in transforms]
                images = tf.switch_case(transformation["layer_idxes"][i], choices)
            return images

    return stateless(TimmRandAugment)
