"""From a picture to an array of the size that a model wants, as timm prepares images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from tfimm_lora.data.errors import DataError
from tfimm_lora.data.geometry import CROP_MODES, centre, resized_size
from tfimm_lora.data.pillow_resample import INTERPOLATIONS
from tfimm_lora.data.registry import suggest

WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Resize:
    """Resizes and crops a picture, as the facts of a checkpoint say.

    Args:
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 3 for colour, 1 for grey.
        interpolation: ``bicubic``, ``bilinear``, ``lanczos``, ``hamming``, ``box`` or ``nearest``.
        crop_pct: Side of the crop over the side of the resized picture.
        crop_mode: ``center`` keeps the aspect ratio and cuts what overlaps, ``squash`` distorts,
            ``border`` keeps the aspect ratio and pads.
        fill: Value per channel that ``border`` pads with; timm takes the mean of the images that
            the model was trained with. Defaults to 0.

    Raises:
        DataError: A value is unknown, or pictures cannot have that number of channels.

    Example:
        >>> Resize(224, 224)(Image.open("rose.jpg")).shape
        (224, 224, 3)
    """

    height: int
    width: int
    channels: int = 3
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    fill: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(
                f"Pictures have 1 or 3 channels, and the model wants {self.channels}: "
                "set --model.in_channels 3."
            )
        check_name("interpolation", self.interpolation, INTERPOLATIONS)
        check_name("crop mode", self.crop_mode, CROP_MODES)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Returns the picture as array of shape (height, width, channels), uint8."""
        picture = to_channels(ImageOps.exif_transpose(picture), self.channels)
        height, width = resized_size(
            np.float64(picture.height),
            np.float64(picture.width),
            (self.height, self.width),
            self.crop_pct,
            self.crop_mode,
            np,
        )
        method = Image.Resampling[self.interpolation.upper()]
        array = np.asarray(picture.resize((int(width), int(height)), method))
        array = array.reshape(*array.shape[:2], self.channels)
        fill = self.fill if self.crop_mode == "border" else (0,)
        return _centre(array, self.height, self.width, fill)


def to_channels(picture: Image.Image, channels: int) -> Image.Image:
    """Converts a picture to colour or grey; what is transparent becomes white.

    Args:
        picture: Any picture: palette, transparent, 16 bits, CMYK.
        channels: 3 or 1.

    Example:
        >>> to_channels(Image.new("RGBA", (2, 2)), 3).getpixel((0, 0))
        (255, 255, 255)
    """
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip
        pixels = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB" if channels == 3 else "L")


def check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    """Checks that a name is one of those that exist.

    Args:
        kind: What is named, such as ``"crop mode"``.
        name: What was given.
        known: The names that exist.

    Raises:
        DataError: The name does not exist; the nearest ones are suggested.

    Example:
        >>> check_name("crop mode", "center", CROP_MODES)
    """
    if name not in known:
        raise DataError(
            f"Unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}."
        )


def _centre(array: np.ndarray, height: int, width: int, fill: tuple[int, ...]) -> np.ndarray:
    """Cuts or pads an array of shape (h, w, channels) to (height, width, channels)."""
    top, above = (int(x) for x in centre(np.float64(array.shape[0]), height, np))
    left, before = (int(x) for x in centre(np.float64(array.shape[1]), width, np))
    array = array[top : top + height, left : left + width]
    if array.shape[:2] == (height, width):
        return array
    result = np.empty((height, width, array.shape[2]), array.dtype)
    result[:] = np.resize(np.asarray(fill, array.dtype), array.shape[2])
    result[above : above + array.shape[0], before : before + array.shape[1]] = array
    return result
