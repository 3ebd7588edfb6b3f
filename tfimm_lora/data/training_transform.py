"""From a picture of any size to a model's input, differently every time, for training."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tfimm_lora.data.errors import DataError
from tfimm_lora.data.evaluation_transform import normalize_pixels
from tfimm_lora.data.image_input import as_bytes, as_image_tensor, as_picture, is_tensorflow
from tfimm_lora.data.keras_augmentation import rand_augment, seed_generator, stateless
from tfimm_lora.data.pillow_resample import INTERPOLATIONS, resize
from tfimm_lora.data.transforms import check_name, to_channels
from tfimm_lora.models.normalization import per_channel

CROP_ATTEMPTS = 10
PROBABILITIES = ("hflip", "vflip", "re_prob")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTransform:
    """Cuts, resizes, augments and normalises one image; made by :func:`create_transform`.

    It is meant for ``dataset.map`` on single images, tensors of shape (h, w, channels), uint8, and
    takes a PIL image or an array as well. Names and defaults are timm's, but for ``color_jitter``,
    which timm sets to 0.4. Cut and flip are timm's; the other changes are Keras' layers, whose
    strengths and distributions are their own.

    Args:
        input_size: Channels, height and width of the result.
        interpolation: As in :class:`EvaluationTransform`; ``random`` is bilinear or bicubic, an
            image at a time.
        mean: Mean per channel, for values in [0, 1].
        std: Standard deviation per channel, likewise.
        normalize: Whether to normalise; without it the result is uint8. Defaults to True.
        scale: Smallest and largest share of the image's area that is cut out.
        ratio: Smallest and largest aspect ratio (width / height) of the cut.
        hflip: Probability to mirror left and right.
        vflip: Probability to mirror top and bottom.
        color_jitter: Strength of ``keras.layers.RandomColorJitter``: one number for brightness,
            contrast and saturation, or three, or four with hue. ``None`` leaves colours alone.
        auto_augment: ``keras.layers.RandAugment`` in timm's spelling, such as ``rand-m9-n2``:
            strength 9 of 10, 2 operations (the default). It takes the place of ``color_jitter``.
        re_prob: Probability to erase a rectangle, by ``keras.layers.RandomErasing``.
        re_mode: What is put there: ``const``, the mean colour, or ``pixel``, noise.
        seed: Where the sequence of changes begins. ``None`` takes one from Python's ``random``,
            which ``keras.utils.set_random_seed`` settles.

    Returns:
        The call returns a tensor (for anything else than a tensor, an array) of shape (height,
        width, channels), float32. Its second argument, an integer tensor of shape (2,), settles
        what happens to the image; without it the transform draws the next one of its own sequence,
        and with ``num_parallel_calls`` which image gets which is not settled.

    Raises:
        DataError: A setting is unknown or out of range, or something else than one image of bytes
            is given.

    Example:
        >>> dataset = dataset.map(TrainingTransform((3, 224, 224), auto_augment="rand-m9-n2"))
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    normalize: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] | None = None
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = "const"
    seed: int | None = None

    def __post_init__(self) -> None:
        check_name("interpolation", self.interpolation, ("random", *INTERPOLATIONS))
        check_name("re_mode", self.re_mode, ("const", "pixel"))
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is a probability, 0 to 1, not {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"scale is (smallest, largest) within 0 to 1, not {self.scale}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"ratio is (smallest, largest) above 0, not {self.ratio}.")
        if isinstance(self.color_jitter, (tuple, list)) and len(self.color_jitter) not in (3, 4):
            raise DataError(
                "color_jitter is one number, or brightness, contrast, saturation and maybe hue, "
                f"not {self.color_jitter}."
            )
        if self.auto_augment:
            parse_rand_augment(self.auto_augment)
        if self.input_size[0] != 3 and (self.auto_augment or self.color_jitter):
            raise DataError(
                f"auto_augment and color_jitter change colours, and the model's images have "
                f"{self.input_size[0]} channels: leave them out."
            )

    def __call__(self, image: Any, seed: Any = None) -> Any:
        """Returns the image as input for the model; see the class."""
        import tensorflow as tf

        graph_tensor = is_tensorflow(image) and not tf.executing_eagerly()
        if graph_tensor:
            seed = self._next_seed() if seed is None else seed
            return tf.autograph.experimental.do_not_convert(self._transform)(image, seed)
        tensor = image if is_tensorflow(image) else self._array(image)
        seed = self._next_seed() if seed is None else tf.cast(seed, tf.int64)
        result = self._compiled(tensor, seed)
        return result if is_tensorflow(image) else result.numpy()

    # --- The stages -----------------------------------------------------------------------------

    def _transform(self, image: Any, seed: Any) -> Any:
        import tensorflow as tf

        channels, height, width = self.input_size
        image = as_image_tensor(image, channels)
        seed = tf.ensure_shape(tf.cast(seed, tf.int64), (2,))
        seeds = iter([tf.random.experimental.stateless_fold_in(seed, i) for i in range(8)])
        top, left, rows, columns = crop_box(tf.shape(image), self.scale, self.ratio, next(seeds))
        image = image[top : top + rows, left : left + columns]
        image = self._resize(image, next(seeds))
        image = tf.ensure_shape(image, (height, width, channels))
        for probability, axis in zip((self.hflip, self.vflip), (1, 0), strict=True):
            flip = tf.random.stateless_uniform((), next(seeds)) < probability
            image = tf.where(flip, tf.reverse(image, [axis]), image)
        if self._layers:
            image = tf.cast(image, tf.float32)
            for layer in self._layers:
                image = tf.clip_by_value(layer(image, next(seeds)), 0, 255)
            image = tf.ensure_shape(image, (height, width, channels))
        if not self.normalize:
            return tf.cast(tf.round(image), tf.uint8) if self._layers else image
        return normalize_pixels(image, channels, self.mean, self.std)

    def _resize(self, image: Any, seed: Any) -> Any:
        import tensorflow as tf

        height, width = (tf.constant(side) for side in self.input_size[1:])
        if self.interpolation != "random":
            return resize(image, height, width, self.interpolation)
        return tf.cond(
            tf.random.stateless_uniform((), seed) < 0.5,
            lambda: resize(image, height, width, "bilinear"),
            lambda: resize(image, height, width, "bicubic"),
        )

    @cached_property
    def _layers(self) -> list[Callable[[Any, Any], Any]]:
        """The layers of Keras, for values in [0, 255]."""
        import keras
        import tensorflow as tf

        layers = []
        with tf.init_scope():  # made once, outside of the graph that first needs them
            if self.auto_augment:
                layers.append(rand_augment(*parse_rand_augment(self.auto_augment)))
            elif self.color_jitter:
                jitter = self.color_jitter
                factors = jitter if isinstance(jitter, (tuple, list)) else (jitter,) * 3
                names = ("brightness", "contrast", "saturation", "hue")
                options: dict[str, Any] = {
                    f"{name}_factor": f for name, f in zip(names, factors, strict=False)
                }
                # Keras' saturation is 0.5 for no change, and 0 or 1 for the two ends.
                reach = options["saturation_factor"] / 2
                options["saturation_factor"] = (0.5 - reach, 0.5 + reach)
                layers.append(stateless(keras.layers.RandomColorJitter, **options))
            if self.re_prob:
                fill = (255 * per_channel(self.mean, self.input_size[0])).tolist()
                constant = tuple(fill) if len(fill) == 3 else fill[0]
                layers.append(
                    stateless(
                        keras.layers.RandomErasing,
                        factor=(self.re_prob, self.re_prob),
                        fill_value=constant if self.re_mode == "const" else None,
                    )
                )
        return layers

    # --- Randomness and arrays ------------------------------------------------------------------

    @cached_property
    def _generator(self) -> Any:
        return seed_generator(self.seed)

    def _next_seed(self) -> Any:
        return self._generator.make_seeds(1)[:, 0]

    @cached_property
    def _compiled(self) -> Any:
        import tensorflow as tf

        shapes = [
            tf.TensorSpec((None, None, None), tf.uint8),
            tf.TensorSpec((2,), tf.int64),
        ]
        return tf.function(self._transform, input_signature=shapes, autograph=False)

    def _array(self, image: Any) -> np.ndarray:
        channels = self.input_size[0]
        picture = image if isinstance(image, Image.Image) else None
        if picture is None:
            array = as_bytes(image)
            if channels not in (1, 3):
                return array
            picture = as_picture(array)
        picture = to_channels(ImageOps.exif_transpose(picture), channels)
        return as_bytes(picture)


def crop_box(
    shape: Any, scale: tuple[float, float], ratio: tuple[float, float], seed: Any
) -> tuple[Any, Any, Any, Any]:
    """Draws a rectangle of random area and aspect ratio, by timm's (Inception's) rule.

    Ten rectangles are drawn and the first that fits is taken; if none does, the largest one in the
    centre that keeps to the aspect ratios.

    Args:
        shape: The image's shape, int32.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest aspect ratio, width / height.
        seed: Integer tensor of shape (2,).

    Returns:
        Top, left, height and width, int32 scalars.

    Example:
        >>> crop_box(tf.constant([100, 80, 3]), (0.5, 1.0), (1.0, 1.0), [1, 2])
    """
    import tensorflow as tf

    def uniform(low: float, high: float, index: int) -> Any:
        own = tf.random.experimental.stateless_fold_in(seed, index)
        return tf.random.stateless_uniform((CROP_ATTEMPTS,), own, low, high, tf.float64)

    height, width = tf.cast(shape[0], tf.float64), tf.cast(shape[1], tf.float64)
    area = uniform(*scale, 0) * height * width
    aspect = tf.exp(uniform(math.log(ratio[0]), math.log(ratio[1]), 1))
    columns = tf.maximum(tf.round(tf.sqrt(area * aspect)), 1)
    rows = tf.maximum(tf.round(tf.sqrt(area / aspect)), 1)
    fits = (columns <= width) & (rows <= height)
    first, found = tf.argmax(tf.cast(fits, tf.int32)), tf.reduce_any(fits)
    rows = tf.where(found, rows[first], tf.minimum(height, tf.round(width / ratio[0])))
    columns = tf.where(found, columns[first], tf.minimum(width, tf.round(height * ratio[1])))

    def place(free: Any, index: int) -> Any:
        own = tf.random.experimental.stateless_fold_in(seed, index)
        anywhere = tf.random.stateless_uniform((), own, 0, tf.cast(free, tf.int32) + 1, tf.int32)
        return tf.where(found, anywhere, tf.cast(tf.floor(free / 2), tf.int32))

    top, left = place(height - rows, 2), place(width - columns, 3)
    return top, left, tf.cast(rows, tf.int32), tf.cast(columns, tf.int32)


def parse_rand_augment(text: str) -> tuple[int, float]:
    """Reads timm's spelling of RandAugment.

    Args:
        text: ``rand``, and after hyphens ``m`` with the strength of 10 and ``n`` with the number of
            operations per image.

    Returns:
        Number of operations and strength in [0, 1].

    Raises:
        DataError: The text says something that ``keras.layers.RandAugment`` does not have.

    Example:
        >>> parse_rand_augment("rand-m9-n2")
        (2, 0.9)
    """
    name, *parts = text.split("-")
    found = {"m": 10.0, "n": 2.0}
    for part in parts:
        match = re.fullmatch(r"([mn])(\d+(?:\.\d+)?)", part)
        if match is None:
            raise DataError(
                f"auto_augment={text!r}: {part!r} has no counterpart in keras.layers.RandAugment. "
                "Give the strength (of 10) and the number of operations: 'rand-m9-n2'."
            )
        found[match[1]] = float(match[2])
    if name != "rand" or not 0 <= found["m"] <= 10 or found["n"] < 1 or found["n"] % 1:
        raise DataError(
            f"auto_augment={text!r} is not understood. Write 'rand-m9-n2': strength 9 of 0 to 10, "
            "2 operations per image. Only RandAugment is there."
        )
    return int(found["n"]), found["m"] / 10
