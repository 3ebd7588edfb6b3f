"""From a picture of any size to a model's input, as timm prepares images for evaluation."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tfimm_lora.data.errors import DataError
from tfimm_lora.data.geometry import CROP_MODES, centre, resized_size
from tfimm_lora.data.image_input import as_bytes, as_image_tensor, as_picture, is_tensorflow
from tfimm_lora.data.pillow_resample import INTERPOLATIONS, resize
from tfimm_lora.data.transforms import Resize, check_name
from tfimm_lora.models.normalization import normalize, per_channel


@dataclasses.dataclass(frozen=True)
class EvaluationTransform:
    """Resizes, crops and normalises one image; made by :func:`create_transform`.

    It takes a PIL image, an array of shape (h, w, channels) or (h, w), uint8, or a TensorFlow
    tensor of such a shape, in ``dataset.map`` too. Images and arrays are resized by Pillow, whose
    pixels are timm's; tensors by the same arithmetic in TensorFlow's operations. A picture is
    turned as its EXIF entry says, and what is transparent becomes white, which timm leaves undone.

    Args:
        input_size: Channels, height and width of the result.
        interpolation: ``bicubic``, ``bilinear``, ``lanczos``, ``hamming``, ``box`` or ``nearest``.
        crop_pct: Side of the crop over the side of the resized image.
        crop_mode: ``center`` keeps the aspect ratio and cuts what overlaps, ``squash`` distorts,
            ``border`` keeps the aspect ratio and pads with the mean.
        mean: Mean per channel, for values in [0, 1].
        std: Standard deviation per channel, likewise.
        normalize: Whether to normalise; without it the result is uint8. Defaults to True.

    Returns:
        The call returns an array (a tensor for a tensor) of shape (height, width, channels),
        float32.

    Raises:
        DataError: A setting is unknown, or something else than one image of bytes is given.

    Example:
        >>> EvaluationTransform((3, 224, 224))(Image.open("rose.jpg")).shape
        (224, 224, 3)
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    normalize: bool = True

    def __post_init__(self) -> None:
        check_name("interpolation", self.interpolation, INTERPOLATIONS)
        check_name("crop mode", self.crop_mode, CROP_MODES)
        if not self.crop_pct > 0:
            raise DataError(f"crop_pct has to be above 0, for example 0.9, not {self.crop_pct}.")

    def __call__(self, image: Any) -> Any:
        """Returns the image as input for the model; see the class."""
        if is_tensorflow(image):
            import tensorflow as tf

            pixels = tf.autograph.experimental.do_not_convert(self._resized_tensor)(image)
        elif isinstance(image, Image.Image):
            pixels = self.resize(image)
        else:
            pixels = self._resized_array(as_bytes(image))
        if not self.normalize:
            return pixels
        return normalize_pixels(pixels, self.input_size[0], self.mean, self.std)

    @property
    def fill(self) -> tuple[int, ...]:
        """What ``border`` pads with, a byte per channel."""
        return tuple(round(255 * float(v)) for v in per_channel(self.mean, self.input_size[0]))

    @cached_property
    def resize(self) -> Resize:
        """Resizing and cropping alone, from a picture to bytes."""
        channels, height, width = self.input_size
        rules = (self.interpolation, self.crop_pct, self.crop_mode, self.fill)
        return Resize(height, width, channels, *rules)

    def _resized_array(self, array: np.ndarray) -> np.ndarray:
        channels, height, width = self.input_size
        if channels in (1, 3):
            return self.resize(as_picture(array))
        if array.shape[2] != channels:
            raise DataError(
                f"The array has {array.shape[2]} channels, and the model wants {channels}."
            )
        rules = (self.interpolation, self.crop_pct, self.crop_mode)
        planes = [
            Resize(height, width, 1, *rules, fill=(fill,))(Image.fromarray(array[..., i]))
            for i, fill in enumerate(self.fill)
        ]
        return np.concatenate(planes, axis=-1)

    def _resized_tensor(self, image: Any) -> Any:
        import tensorflow as tf

        channels, height, width = self.input_size
        image = as_image_tensor(image, channels)
        h, w = (tf.cast(tf.shape(image)[axis], tf.float64) for axis in (0, 1))
        rows, columns = resized_size(h, w, (height, width), self.crop_pct, self.crop_mode, tf)
        image = resize(
            image, tf.cast(rows, tf.int32), tf.cast(columns, tf.int32), self.interpolation
        )
        top, above = (tf.cast(x, tf.int32) for x in centre(rows, height, tf))
        left, before = (tf.cast(x, tf.int32) for x in centre(columns, width, tf))
        image = image[top : top + height, left : left + width]
        # What lies outside: the picture is moved away from 0, and back after the padding.
        fill = tf.constant(self.fill if self.crop_mode == "border" else (0,) * channels, tf.int32)
        kept = tf.shape(image)
        margins = [[above, height - above - kept[0]], [before, width - before - kept[1]], [0, 0]]
        image = tf.pad(tf.cast(image, tf.int32) - fill, margins) + fill
        return tf.ensure_shape(tf.cast(image, tf.uint8), (height, width, channels))


def normalize_pixels(
    pixels: Any, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Any:
    """Normalises values in [0, 255], of an array or a TensorFlow tensor, to float32.

    Example:
        >>> normalize_pixels(np.full((1, 1, 1), 255, "uint8"), 1, (0.5,), (0.5,))
        array([[[1.]]], dtype=float32)
    """
    values = per_channel(mean, channels), per_channel(std, channels)
    if isinstance(pixels, np.ndarray):
        return normalize(pixels.astype(np.float32), *values)
    import tensorflow as tf

    return normalize(tf.cast(pixels, tf.float32), *values)
