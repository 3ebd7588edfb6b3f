"""What a trained model leaves in the run folder: adapter, merged model, proof that they agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfimm_lora.training.fit import Fit

if TYPE_CHECKING:
    import keras

MERGE_TOLERANCE = 1e-3
"""Largest difference of logits before and after merging, relative to their standard deviation.

Rounding gives some 1e-6 in float32; mixed precision is compared in float32 too.
"""


def save_results(fit: Fit, method: str, folder: Path, *, save_models: bool) -> dict[str, Any]:
    """Writes the trained model of one method.

    ``lora`` gives ``adapter/``, and of the merged model ``model.safetensors`` (timm's key names)
    and ``model.keras``; the other methods give ``model.safetensors``.

    Args:
        fit: The trained model.
        method: ``linear_probe``, ``lora`` or ``full``.
        folder: Where the files go.
        save_models: Whether whole models are written, or only the adapter.

    Returns:
        What is to be added to the figures.

    Raises:
        RuntimeError: The merged model differs from the adapted one.

    Example:
        >>> save_results(fit, "lora", Path("runs/first/lora"), save_models=True)
    """
    from tfimm_lora.models import save_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    regular, figures = fit.model, {}
    if method == "lora":
        from tfimm_lora import lora

        lora.save_adapter(fit.model, folder / "adapter")
        images = next(iter(fit.validation.as_numpy_iterator()))[0]
        before = logits(fit.model, images)
        regular = lora.convert_to_regular_model(fit.model)
        figures["merge_difference"] = checked_difference(before, logits(regular, images))
    if save_models:
        save_safetensors(regular, folder / "model.safetensors")
        if method == "lora":
            from tfimm_lora.weights.safetensors_file import write_aside

            write_aside(folder / "model.keras", regular.save)
    return figures


def logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns a model's logits of a few images, float32 (images, classes)."""
    return np.asarray(model.predict_on_batch(images), np.float32)


def checked_difference(before: np.ndarray, after: np.ndarray) -> float:
    """Returns the largest difference of two models' logits over their standard deviation.

    Raises:
        RuntimeError: It is more than rounding.
    """
    difference = float(np.abs(after - before).max() / max(before.std(), 1e-12))
    if not difference <= MERGE_TOLERANCE:
        raise RuntimeError(
            f"The merged model's logits differ by {difference:.1e} of their standard deviation; "
            f"at most {MERGE_TOLERANCE:.0e} is rounding. The adapter was not merged rightly."
        )
    return difference
