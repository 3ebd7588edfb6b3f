"""The digits that come with the package: 1797 grey images of 8 × 8 pixels, ten classes."""

from __future__ import annotations

from importlib import resources

import numpy as np
from PIL import Image

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.sources import register_source
from tfimm_lora.data.split import RandomAccessSplit, Source


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits; ``digits.json`` beside this file says where they come from.

    Returns:
        Images, shape (1797, 8, 8), uint8 from 0 (paper) to 255 (ink), and labels, shape (1797,),
        int64 from 0 to 9.

    Example:
        >>> images, labels = load_digits()
    """
    file = resources.files("tfimm_lora.data").joinpath("digits.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:
        # Stored as the data set counts them, 0 to 16 inked pixels in each block of 4 × 4.
        images = np.rint(arrays["images"] * (255 / 16)).astype(np.uint8)
        return images, arrays["labels"].astype(np.int64)


@register_source("digits")
def open_digits(config: DataConfig, argument: str) -> Source:
    """Opens the embedded digits.

    Args:
        config: The ``data`` section of a recipe.
        argument: Nothing follows the name.

    Example:
        >>> len(open_digits(DataConfig(), "").train.labels)
        1797
    """
    images, labels = load_digits()
    return Source(
        description="handwritten digits (embedded; UCI optical recognition, CC BY 4.0)",
        class_names=tuple(str(digit) for digit in range(10)),
        train=RandomAccessSplit("digits", labels, list(images), Image.fromarray),
        flip=False,
    )
