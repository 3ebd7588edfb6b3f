"""From a picture to an array of the size that a model wants, as timm prepares images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from tfimm_lora.data.errors import DataError
from tfimm_lora.data.registry import suggest

CROP_MODES = ("center", "squash", "border")
WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Resize:
    """Resizes and crops a picture, as the facts of a checkpoint say.

    Args:
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 3 for colour, 1 for grey.
        interpolation: ``bicubic``, ``bilinear``, ``lanczos`` or ``nearest``.
        crop_pct: Side of the crop over the side of the resized picture.
        crop_mode: ``center`` keeps the aspect ratio and cuts what overlaps, ``squash`` distorts,
            ``border`` keeps the aspect ratio and pads with the value 0.

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

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(
                f"Pictures have 1 or 3 channels, and the model wants {self.channels}: "
                "set --model.in_channels 3."
            )
        known = [method.name.lower() for method in Image.Resampling]
        if self.interpolation not in known:
            raise DataError(
                f"Unknown interpolation {self.interpolation!r}."
                f"{suggest(self.interpolation, known)} Known: {', '.join(known)}."
            )
        if self.crop_mode not in CROP_MODES:
            raise DataError(
                f"Unknown crop mode {self.crop_mode!r}. Known: {', '.join(CROP_MODES)}."
            )

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Returns the picture as array of shape (height, width, channels), uint8."""
        picture = to_channels(ImageOps.exif_transpose(picture), self.channels)
        # timm resizes to size / crop_pct and cuts the centre.
        resized = (int(self.height / self.crop_pct), int(self.width / self.crop_pct))
        picture = self._resized(picture, *resized)
        array = np.asarray(picture)
        return _centre(array.reshape(*array.shape[:2], self.channels), self.height, self.width)

    def _resized(self, picture: Image.Image, height: int, width: int) -> Image.Image:
        method = Image.Resampling[self.interpolation.upper()]
        if self.crop_mode == "squash":
            return picture.resize((width, height), method)
        ratios = (height / picture.height, width / picture.width)
        ratio = max(ratios) if self.crop_mode == "center" else min(ratios)
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        return picture.resize(size, method)


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


def _centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts or pads (with 0) an array of shape (h, w, channels) to (height, width, channels)."""
    for axis, wanted in ((0, height), (1, width)):
        surplus = array.shape[axis] - wanted
        if surplus > 0:
            start = round(surplus / 2)
            array = np.take(array, range(start, start + wanted), axis=axis)
        elif surplus < 0:
            before = -surplus // 2
            padding = [(0, 0)] * 3
            padding[axis] = (before, -surplus - before)
            array = np.pad(array, padding)
    return array
