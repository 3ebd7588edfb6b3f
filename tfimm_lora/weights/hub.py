"""Finding a checkpoint: on the hub (through its cache), in a folder, or in a file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.weights.download import download, find_file
from tfimm_lora.weights.hub_config import read_hub_config

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
_PREFIXES = {"hf-hub": HUB_PREFIX, "hf_hub": HUB_PREFIX, "local-dir": FOLDER_PREFIX}
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
# OpenCLIP's names for the same kind of file.
_WEIGHT_FILES = (_WEIGHTS, "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_SHARDS = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A weights file with what is known about it.

    Attributes:
        path: The ``.safetensors`` file.
        pretrained_cfg: The facts.
        model_args: Constructor arguments, in timm's spelling, in which the checkpoint's model
            differs from its architecture.
    """

    path: Path
    pretrained_cfg: PretrainedConfig
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)


def split_source(name: str) -> tuple[str, str]:
    """Splits timm's ``hf-hub:org/repo`` or ``local-dir:folder`` into prefix and place.

    Args:
        name: A model's name, or what ``pretrained=`` says.

    Returns:
        ``"hf-hub:"``, ``"local-dir:"`` or ``""``, and the rest.

    Raises:
        ValueError: There is nothing behind the prefix.

    Example:
        >>> split_source("hf-hub:timm/test_vit.r160_in1k")
        ('hf-hub:', 'timm/test_vit.r160_in1k')
    """
    kind, colon, place = name.partition(":")
    prefix = _PREFIXES.get(kind.lower(), "") if colon else ""
    if not prefix:
        return "", name
    if not place:
        example = "org/repo" if prefix == HUB_PREFIX else "/path/of/a/folder"
        raise ValueError(f"{name!r} names no place. Write {prefix}{example}.")
    return prefix, place


def find_config(source: str) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Reads the ``config.json`` of a hub repository or a folder, and no weights.

    Args:
        source: ``hf-hub:org/repo``, ``hf-hub:org/repo@revision``, ``local-dir:folder`` or a folder.

    Returns:
        The facts, and the constructor arguments in which the checkpoint's model differs from its
        architecture, in timm's spelling.

    Raises:
        OSError: The file can be neither found nor downloaded; the message says what to do.
        ValueError: The file is not what timm writes.

    Example:
        >>> facts, arguments = find_config("hf-hub:timm/test_vit.r160_in1k")
    """
    prefix, place = split_source(source)
    if prefix == HUB_PREFIX:
        repo, revision = _split_revision(place)
        facts, arguments = read_hub_config(download(repo, _CONFIG, revision))
        facts.hf_hub_id = repo
        return facts, arguments
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to load pretrained weights from.")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {_CONFIG}. A pretrained folder holds {_CONFIG} and {_WEIGHTS}, as "
            "timm and save_pretrained write them; for a single file use model_path=FILE."
        )
    return read_hub_config(folder / _CONFIG)


def find_checkpoint(source: str | PretrainedConfig) -> Checkpoint:
    """Finds the weights that ``create_model(pretrained=...)`` asks for.

    Downloads go through ``huggingface_hub`` and its cache: ``HF_HOME`` moves the cache,
    ``HF_HUB_OFFLINE=1`` forbids network, ``HF_TOKEN`` opens private repositories, ``HF_ENDPOINT``
    names another hub.

    Args:
        source: Facts from the registry; ``hf-hub:org/repo`` or ``hf-hub:org/repo@revision``; a
            folder with ``config.json`` and weights, with or without ``local-dir:`` in front.

    Returns:
        The file and its facts.

    Raises:
        OSError: The file can be neither found nor downloaded; the message says what to do.
        ValueError: The checkpoint has no weights that can be read, or its ``config.json`` is not
            what timm writes.

    Example:
        >>> checkpoint = find_checkpoint("hf-hub:timm/convnext_tiny.fb_in1k")
    """
    if isinstance(source, PretrainedConfig):
        name = ".".join(filter(None, (source.architecture, source.tag)))
        if source.file:
            return Checkpoint(Path(source.file), source)
        if source.url and not source.hf_hub_id:
            raise ValueError(
                f"The weights of {name!r} are not on the hub. Their authors have them as a pickle, "
                f"which can run code when it is opened and is not read: {source.url}. If you trust "
                "it, convert it where torch is, see the documentation's page Bring your timm "
                "checkpoint, and pass model_path='FILE.safetensors'."
            )
        if not source.has_weights or not source.hf_hub_id:
            raise ValueError(
                f"There are no pretrained weights for {name!r}. See "
                "tfimm_lora.list_models(pretrained=True, include_tags=True)."
            )
        path = download(source.hf_hub_id, source.hf_hub_filename, None)
        return Checkpoint(path, source)
    facts, arguments = find_config(source)
    prefix, place = split_source(source)
    if prefix == HUB_PREFIX:
        path = _hub_weights(place, facts.hf_hub_filename)
    else:
        path = _folder_weights(Path(place), facts.hf_hub_filename)
        facts.file = str(path)
    facts.hf_hub_filename = path.name
    return Checkpoint(path, facts, arguments)


def _split_revision(place: str) -> tuple[str, str | None]:
    repo, _, revision = place.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise OSError(
            f"{HUB_PREFIX}{place} could not be fetched: {repo!r} is no name of a repository, which "
            "is org/repo. For a folder use local-dir:FOLDER."
        )
    return repo, revision or None


def _candidates(named: str) -> tuple[str, ...]:
    """Names that the weights can have, the likeliest first; a pickle's name stands for its twin."""
    named = re.sub(r"\.(bin|pth|pt)$", ".safetensors", named)
    return tuple(dict.fromkeys(filter(None, (named, *_WEIGHT_FILES))))


def _hub_weights(place: str, named: str) -> Path:
    repo, revision = _split_revision(place)
    first, *others = _candidates(named)
    try:
        return download(repo, first, revision)
    except FileNotFoundError as error:
        found = find_file(repo, (*others, _SHARDS, *_PICKLES), revision)
        if found in others:
            return download(repo, str(found), revision)
        raise _no_weights(f"hub repository {repo}", found, HUB_PREFIX + place) from error


def _folder_weights(folder: Path, named: str) -> Path:
    for name in _candidates(named):
        if (folder / name).is_file():
            return folder / name
    for name in (_SHARDS, *_PICKLES):
        if (folder / name).is_file():
            raise _no_weights(str(folder), name, f"{FOLDER_PREFIX}{folder}")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{folder} has no {_WEIGHTS} but {len(files)} other files that could be meant: "
            f"{', '.join(f.name for f in files[:5])}. Rename the right one to {_WEIGHTS}."
        )
    pickles = sorted(f.name for s in ("*.bin", "*.pth", "*.pt", "*.ckpt") for f in folder.glob(s))
    raise _no_weights(str(folder), pickles[0] if pickles else None, f"{FOLDER_PREFIX}{folder}")


def _no_weights(where: str, found: str | None, source: str) -> Exception:
    """The error for a place without a file that is read, and what to do about what is there."""
    if found == _SHARDS:
        return ValueError(
            f"{where} has its weights in several files ({_SHARDS}), which timm does not read "
            f"either. Merge them: read each with safetensors.numpy.load_file, and write all "
            f"tensors to one {_WEIGHTS} with safetensors.numpy.save_file."
        )
    if found:
        return ValueError(
            f"{where} has its weights only as {found}, a pickle, which can run code when it is "
            "opened and is not read. If you trust it, convert it where timm is installed: "
            f"timm.models.save_for_hf(timm.create_model({source!r}, pretrained=True), 'folder', "
            "safe_serialization=True); then pass pretrained='folder'. For a repository of yours, "
            "push it again with safe_serialization=True."
        )
    return FileNotFoundError(
        f"{where} has no {_WEIGHTS}. Beside {_CONFIG} there has to be a weights file as timm and "
        "save_pretrained write it; for a single file use model_path=FILE."
    )
