"""Loading a safetensors checkpoint into a model: in timm's key names, or in those of others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.weights.adapt import adapt_weight, is_below
from tfimm_lora.weights.first_values import assign_all
from tfimm_lora.weights.foreign import described, in_timm_names, known_formats
from tfimm_lora.weights.names import timm_variables
from tfimm_lora.weights.safetensors_file import read_safetensors


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_names(missing: set[str], surplus: set[str], source: str, hint: str = "") -> None:
    """Raises if a source lacks weights or has some that the model does not have.

    ``hint`` is added to the message.

    Raises:
        ValueError: Names the missing and the surplus weights.
    """
    if not missing and not surplus:
        return
    lines = [f"The weights in {source} do not fit the model."]
    if missing:
        lines.append(f"Missing in the source: {_some(missing)}.")
    if surplus:
        lines.append(f"Not in the model: {_some(surplus)}.")
    norms = {"norm.weight", "fc_norm.weight"}
    if norms & missing and norms & surplus:
        lines.append("The last normalisation is in another place: pass fc_norm=True or False.")
    lines.append("Check the model's name and the config fields you changed.")
    raise ValueError(" ".join([*lines, hint]).strip())


def classes_of(shapes: Mapping[str, tuple[int, ...]], classifier: Iterable[str]) -> int:
    """Number of classes of the first classifier among a file's tensors, 0 if it has none."""
    for path in classifier:
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in shapes:
                return shapes[f"{path}.{leaf}"][0]
    return 0


def load_safetensors(
    model: Any,
    path: str | os.PathLike[str],
    *,
    source_size: tuple[int, int] | None = None,
    fresh_classifier: bool = True,
) -> int | None:
    """Loads weights in timm's key names, tensor by tensor, fitting what timm would fit.

    The first convolution is adapted to the model's channels, position table and patch kernel to
    its image and patch size. Low-rank factors of a LoRA model are left as they are.

    Args:
        model: A built model.
        path: A ``.safetensors`` file of float16, bfloat16 or float32 tensors.
        source_size: Height and width of the images that the weights were trained with; ``None``
            assumes a square position table.
        fresh_classifier: Whether a classifier with another number of classes is left out, so that
            the model keeps its fresh one. Defaults to ``True``.

    Returns:
        Number of classes of the file's classifier, 0 if it has none, ``None`` if the model does
        not say which layer is the classifier.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, or a weight is missing, surplus or of a wrong shape.

    Example:
        >>> load_safetensors(model, "model.safetensors")
    """
    cfg = getattr(model, "cfg", None)
    classifier = classifier_paths(cfg)
    variables = timm_variables(model)
    with read_safetensors(path) as stored_file:
        file = in_timm_names(stored_file, cfg)
        found = classes_of(file.shapes, classifier)
        wanted = getattr(cfg, "nb_classes", found)
        skipped: set[str] = set()
        if classifier and found != wanted:
            if not fresh_classifier and found:
                raise ValueError(
                    f"{file.path} has a classifier of {found} classes and the model one of "
                    f"{wanted}. Pass nb_classes={found} to load it, or nb_classes={wanted} to "
                    "leave it out and start with a fresh one."
                )
            skipped = {n for n in {*variables, *file.shapes} if is_below(n, classifier)}
        names = set(variables) - skipped
        missing = names - set(file.shapes)
        hint = known_formats(cfg) if file is stored_file and len(missing) * 2 > len(names) else ""
        check_names(missing, set(file.shapes) - names - skipped, described(file), hint)
        source_size = getattr(file, "source_size", None) or source_size

        def value_of(name: str) -> np.ndarray:
            entry = variables[name]
            stored = entry.from_timm(file.read(name))
            try:
                value = adapt_weight(model, name, stored, entry.variable.shape, source_size)
            except ValueError as error:
                raise ValueError(f"{file.path}: {error}") from error
            # timm fits a weight in float32 and goes back to the type of the checkpoint.
            return value if value is stored else file.rounded(name, value)

        assign_all((variables[n].variable, partial(value_of, n)) for n in sorted(names))
    return found if classifier else None
