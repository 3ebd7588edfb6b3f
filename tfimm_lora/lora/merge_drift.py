"""By how much outputs change when merged kernels are rounded again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class MergeDrift:
    """What rounding merged kernels has changed.

    Attributes:
        largest: Largest absolute change of an output (a logit).
        largest_output: Largest absolute output before.
        images: Number of images that it was measured on.
        of_noise: Whether the images were noise, because none were given.
        rounded: timm paths of the layers whose kernels were rounded again.
    """

    largest: float
    largest_output: float
    images: int
    of_noise: bool
    rounded: tuple[str, ...]

    def __str__(self) -> str:
        kind = "images of noise" if self.of_noise else "images"
        return (
            f"largest change of an output {self.largest:.3g} (outputs up to "
            f"{self.largest_output:.3g}) on {self.images} {kind}; {len(self.rounded)} kernels "
            "were rounded again"
        )


def calibration_images(model: Any, calibration: Any) -> np.ndarray:
    """The images given, or noise of the shape that a model takes.

    Raises:
        ValueError: There are no images.
    """
    if calibration is None:
        inputs = getattr(model, "inputs", None)
        shape = inputs[0].shape[1:] if inputs else (*model.cfg.input_size, model.cfg.in_channels)
        noise = np.random.default_rng(0).standard_normal((_IMAGES, *shape))
        return noise.astype(np.float32)
    images = np.asarray(ops.convert_to_numpy(calibration))
    if not len(images):
        raise ValueError("calibration has no images. Pass a batch, (images, height, width, 3).")
    return images


def model_outputs(model: Any, images: np.ndarray) -> list[np.ndarray]:
    """All outputs of a model, as arrays."""
    outputs = model(images, training=False)
    return [np.asarray(ops.convert_to_numpy(y), np.float32) for y in keras.tree.flatten(outputs)]


def report_drift(
    model: Any,
    before: Callable[[np.ndarray], list[np.ndarray]],
    after: Callable[[np.ndarray], list[np.ndarray]],
    rounded: Sequence[str],
    calibration: Any,
) -> None:
    """Measures the change, keeps it as ``model.merge_drift``, and warns if kernels were rounded.

    Args:
        model: The model that gets ``merge_drift``, a :class:`MergeDrift`.
        before: Outputs before the merge.
        after: Outputs after it.
        rounded: timm paths of the layers whose kernels were rounded again.
        calibration: Images, or ``None`` for noise.
    """
    images = calibration_images(model, calibration)
    pairs = list(zip(before(images), after(images), strict=True))
    drift = MergeDrift(
        max(float(np.abs(x - y).max()) for x, y in pairs),
        max(float(np.abs(x).max()) for x, _ in pairs),
        len(images),
        calibration is None,
        tuple(rounded),
    )
    model.merge_drift = drift
    if rounded:
        warnings.warn(f"Merged into quantised kernels: {drift}.", stacklevel=4)
