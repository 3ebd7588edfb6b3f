"""Reading an adapter's two files: everything is checked before anything is built."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfimm_lora.lora.config import check_adapter_name
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.peft.adapter_file import AdapterFile
from tfimm_lora.lora.peft.config import check_config, method_of, on_rewritten_base
from tfimm_lora.lora.peft.json_file import parse_json, read_json
from tfimm_lora.lora.peft.own_fields import check_own
from tfimm_lora.lora.peft.tensors import PREFIX, SHARED_PREFIX
from tfimm_lora.lora.peft.understanding import understand
from tfimm_lora.weights.download import download
from tfimm_lora.weights.hub import HUB_PREFIX, split_source
from tfimm_lora.weights.safetensors_file import SafetensorsFile, read_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METADATA = "tfimm_lora"
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_FLOATS = ("F32", "F16", "BF16")
# What PEFT stores beside head.bias with bias="all", and itself ignores.
_DUPLICATES = re.compile(r"\.(original_module|modules_to_save)\.")
# An adapter that is larger than this many times its model is none.
_LARGEST, _ALLOWED = 8, 10_000_000


def read_adapter(
    folder_or_hub_id: str | os.PathLike[str],
    name: str = "default",
    model: keras.Model | None = None,
    rewritten_base: bool = False,
) -> AdapterFile:
    """Reads an adapter's files.

    Args:
        folder_or_hub_id: See :func:`~tfimm_lora.lora.load_adapter`.
        name: See :func:`~tfimm_lora.lora.load_adapter`.
        model: The model that the adapter is for: with it, PEFT's rules say which modules the file
            has to hold tensors for, and names of the library transformers are translated.
        rewritten_base: See :func:`~tfimm_lora.lora.load_adapter`.

    Raises:
        FileNotFoundError: There is no such folder or file.
        OSError: The hub cannot be reached.
        ValueError: The files are no adapter that can be read.
    """
    check_adapter_name(name)
    config_path, weights_path = find_files(folder_or_hub_id, name)
    with read_safetensors(weights_path) as file:
        own = parse_json(file.metadata.get(METADATA) or "{}", f"{weights_path}: {METADATA}")
        config = _read_config(config_path, own)
        method_of(config, str(config_path))
        check_config(config, str(config_path))
        if rewritten_base:
            config = on_rewritten_base(config, str(config_path))
        method = METHODS[method_of(config, str(config_path))]
        check_own(own, str(weights_path))
        _check_sizes(file, model)
        _check_rank(config, file, method.in_place, str(config_path))
        names = {
            _without_prefix(n, method.peft_shared, weights_path): n
            for n in file.shapes
            if not _DUPLICATES.search(n)
        }
        tensors = {key: _read(file, n) for key, n in names.items()}
    adapter = AdapterFile(str(weights_path), config, own, dict(own.get("lora", {})), tensors)
    if not own:
        understand(adapter, str(config_path), model)
    return adapter


def find_files(source: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Returns the paths of config and weights, downloaded if need be.

    Raises:
        FileNotFoundError: There is no such folder or file.
        OSError: The hub cannot be reached.
    """
    prefix, text = split_source(str(source))
    folder = Path(text)
    if prefix == HUB_PREFIX or not folder.is_dir():
        repo, at, revision = text.partition("@")
        fits = _REPO.fullmatch(repo) and (_REVISION.fullmatch(revision) or not at)
        if not fits or ".." in text or (not prefix and folder.exists()):
            raise FileNotFoundError(
                f"There is no adapter folder {text!r} (and it is no 'org/repo' on the hub)."
            )
        inside = "" if name == "default" else f"{name}/"
        if inside and _is_absent(repo, inside + CONFIG_FILE, revision or None):
            inside = ""
        files = [download(repo, inside + f, revision or None) for f in (CONFIG_FILE, WEIGHTS_FILE)]
        return files[0], files[1]
    if name != "default" and (folder / name).is_dir():
        folder = folder / name
    for needed in (WEIGHTS_FILE, CONFIG_FILE):
        if (folder / needed).is_file():
            continue
        pickled = (folder / "adapter_model.bin").is_file() and needed == WEIGHTS_FILE
        hint = (
            " adapter_model.bin is a pickle, which can run code when it is opened and is not read; "
            "save the adapter again in PEFT, which writes safetensors."
            if pickled
            else ""
        )
        raise FileNotFoundError(f"The adapter folder {folder} has no {needed}.{hint}")
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _is_absent(repo: str, filename: str, revision: str | None) -> bool:
    """Whether a repository is known not to have a file; errors are left to the download."""
    import huggingface_hub

    try:
        download(repo, filename, revision)
    except FileNotFoundError:
        return True
    except OSError:
        # Offline the cache knows what was asked for before and is not there.
        found = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision)
        return found is huggingface_hub._CACHED_NO_EXIST
    return False


def _read_config(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    config = read_json(path)
    if own and config != own.get("config"):
        warnings.warn(
            f"{path} is not the config that was saved with the weights (it was edited, or saving "
            "was interrupted). The config inside the weights file is used.",
            stacklevel=4,
        )
        inside = own.get("config")
        if not isinstance(inside, dict):
            raise ValueError(f"{path}: the weights file has no config inside.")
        return inside
    return config


def _check_sizes(file: SafetensorsFile, model: Any) -> None:
    for name, dtype in file.dtypes.items():
        if dtype not in _FLOATS:
            raise ValueError(
                f"{file.path}: tensor {name!r} has the type {dtype}; weights of adapters are "
                f"{', '.join(_FLOATS)}."
            )
    if model is None:
        return
    size = sum(math.prod(shape) for shape in file.shapes.values())
    weights = int(sum(math.prod(v.shape) for v in model.weights))
    if size > max(_LARGEST * weights, _ALLOWED):
        largest = max(file.shapes, key=lambda n: math.prod(file.shapes[n]))
        raise ValueError(
            f"{file.path} holds {size:,} weights, the model has {weights:,}. An adapter is "
            f"smaller; the largest tensor is {largest!r} with the shape {file.shapes[largest]}."
        )


def _check_rank(config: dict[str, Any], file: SafetensorsFile, in_place: bool, source: str) -> None:
    """Raises for ranks that no tensor has, before variables of such a rank are made."""
    if config.get("peft_type") not in ("LORA", "LOHA", "VERA") or in_place:
        return
    side = max((n for shape in file.shapes.values() for n in shape), default=0)
    for rank in (config.get("r", 1), *(config.get("rank_pattern") or {}).values()):
        if rank > side:
            raise ValueError(
                f"{source}: the rank is {rank:,}, and no tensor in {file.path.name} has a side "
                f"of more than {side:,}."
            )


def _read(file: SafetensorsFile, name: str) -> np.ndarray:
    value = file.read(name)
    if not np.isfinite(value).all():
        raise ValueError(f"{file.path}: tensor {name!r} has values that are not finite.")
    return value


def _without_prefix(name: str, shared: tuple[str, ...], path: Path) -> str:
    if name.startswith(PREFIX):
        return name[len(PREFIX) :]
    bare = name.removeprefix(SHARED_PREFIX)
    if bare in shared:
        return bare
    raise ValueError(f"{path}: tensor {name!r} does not start with {PREFIX!r}.")
