"""Loading a checkpoint into a model: in timm's key names, in those of others, or saved by tfimm."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from tfimm_lora.architectures.config import classifier_paths
from tfimm_lora.weights.adapt import adapt_weight, is_below
from tfimm_lora.weights.first_values import assign_all
from tfimm_lora.weights.foreign import described, in_timm_names, known_formats
from tfimm_lora.weights.foreign.view import TensorFile
from tfimm_lora.weights.names import is_lora_weight, named_variables, timm_variables
from tfimm_lora.weights.safetensors_file import read_safetensors
from tfimm_lora.weights.tfimm_files import check_lora_config, is_tfimm_file, read_tfimm

# A layer in front of the classifier in some ViTs of tfimm and of early timm; it goes with it.
_REPRESENTATION = "pre_logits"


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
    if any(is_below(name, _REPRESENTATION) for name in surplus):
        lines.append(
            f"{_REPRESENTATION} is a representation layer, which timm has given up and models here "
            "do not have: pass the nb_classes of your own task to leave it out together with the "
            "classifier."
        )
    lines.append("Check the model's name and the config fields you changed.")
    raise ValueError(" ".join([*lines, hint]).strip())


def classes_of(shapes: Mapping[str, tuple[int, ...]], classifier: Iterable[str]) -> int:
    """Number of classes of the first classifier among a file's tensors, 0 if it has none."""
    for path in classifier:
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in shapes:
                return (shapes[f"{path}.{leaf}"] or (1,))[0]  # a scalar is of a broken file
    return 0


@contextlib.contextmanager
def open_weights(path: str | os.PathLike[str], cfg: Any) -> Iterator[TensorFile]:
    """Opens a file of weights under timm's names.

    Args:
        path: A ``.safetensors`` file, or weights that tfimm has saved.
        cfg: Config of the model that the weights are for.

    Yields:
        The open file; tensors are read one by one when asked for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken or of another kind, or holds a LoRA model that does not fit
            the config.

    Example:
        >>> with open_weights("model.h5", cfg) as file:
        ...     shape = file.shapes["head.weight"]
    """
    if is_tfimm_file(path):
        with read_tfimm(path) as saved:
            check_lora_config(saved, cfg)
            yield saved
    else:
        with read_safetensors(path) as stored:
            yield in_timm_names(stored, cfg)


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
    with read_safetensors(path) as stored:
        file = in_timm_names(stored, getattr(model, "cfg", None))
        return load_file(model, file, source_size=source_size, fresh_classifier=fresh_classifier)


def load_file(
    model: Any,
    file: TensorFile,
    *,
    source_size: tuple[int, int] | None = None,
    fresh_classifier: bool = True,
) -> int | None:
    """:func:`load_safetensors` for a file that is open.

    Low-rank factors are loaded where the file has some.

    Args:
        model: A built model.
        file: The file under timm's names, see :func:`open_weights`.
        source_size: See :func:`load_safetensors`.
        fresh_classifier: See :func:`load_safetensors`.

    Returns:
        See :func:`load_safetensors`.

    Raises:
        ValueError: A weight cannot be read, is missing, surplus or of a wrong shape.

    Example:
        >>> with open_weights("model.h5", model.cfg) as file:
        ...     load_file(model, file)
    """
    cfg = getattr(model, "cfg", None)
    classifier = classifier_paths(cfg)
    variables = timm_variables(model)
    if any(is_lora_weight(name.rpartition(".")[2]) for name in file.shapes):
        variables = {v.name: v for v in named_variables(model)}
    found = classes_of(file.shapes, classifier)
    wanted = getattr(cfg, "nb_classes", found)
    skipped: set[str] = set()
    if classifier and found != wanted:
        if not fresh_classifier and found:
            raise ValueError(
                f"{file.path} has a classifier of {found} classes and the model one of {wanted}. "
                f"Pass nb_classes={found} to load it, or nb_classes={wanted} to leave it out and "
                "start with a fresh one."
            )
        # Pooled features without the layer in front of the classifier would be other features.
        head = (*classifier, _REPRESENTATION) if wanted else classifier
        skipped = {n for n in {*variables, *file.shapes} if is_below(n, head)}
    names = set(variables) - skipped
    missing = names - set(file.shapes)
    unknown = not getattr(file, "origin", "") and len(missing) * 2 > len(names)
    hint = known_formats(cfg) if unknown else ""
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
