"""Finding a checkpoint: on the hub (through its cache), in a folder, or in a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tfimm_lora.architectures.pretrained import PretrainedConfig

HUB_PREFIX = "hf-hub:"
_STATS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license", "first_conv")


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


def download(repo: str, filename: str, revision: str | None) -> Path:
    """Fetches one file through the hub's cache; environment variables rule cache and token.

    Args:
        repo: ``org/repo``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; ``None`` is the main branch.

    Returns:
        The file in the cache.

    Raises:
        OSError: The file can be neither found nor downloaded; the message says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{filename} of hub repository {repo}" + (
        f" at revision {revision}" if revision else ""
    )
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision))
    except errors.GatedRepoError as error:
        raise OSError(
            f"{where} is gated: accept its terms on the hub, then set HF_TOKEN or run "
            f"`hf auth login`. ({error})"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{where} was not found. Check the name; for a private repository set HF_TOKEN. "
            f"({error})"
        ) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        # LocalEntryNotFoundError is an EntryNotFoundError: offline and not in the cache.
        raise OSError(
            f"{where} could not be found. Offline, it has to be in the hub's cache already; or "
            f"download the file elsewhere and pass model_path=FILE. ({error})"
        ) from error
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise OSError(
            f"{where} could not be fetched: {error}. Without network, download the file elsewhere "
            "and pass model_path=FILE."
        ) from error


def read_hub_config(path: Path, filename: str = "model.safetensors") -> PretrainedConfig:
    """Reads the ``config.json`` that timm writes beside weights.

    Args:
        path: The ``config.json``.
        filename: The weights file beside it.

    Returns:
        The facts about the checkpoint.

    Raises:
        ValueError: The file is no JSON or names no architecture.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts: dict[str, Any] = {**config, **config.get("pretrained_cfg", {})}
        architecture = config["architecture"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a timm config.json with a field 'architecture': {error!r}."
        ) from error
    known = {k: facts[k] for k in _STATS if facts.get(k) is not None}
    size = facts.get("input_size")
    if size is not None:
        known["input_size"] = tuple(size)
    classes = config.get("num_classes", facts.get("num_classes"))
    return PretrainedConfig(
        architecture=architecture.split(".")[0],
        tag=facts.get("tag") or "",
        hf_hub_filename=filename,
        num_classes=1000 if classes is None else classes,
        classifier=facts.get("classifier") or "",
        fixed_input_size=bool(facts.get("fixed_input_size", False)),
        **known,
    )


def read_model_args(path: Path) -> dict[str, Any]:
    """Reads the constructor arguments in a ``config.json`` that :func:`read_hub_config` reads."""
    return json.loads(path.read_text(encoding="utf-8")).get("model_args") or {}


def find_checkpoint(source: str | PretrainedConfig) -> Checkpoint:
    """Finds the weights that ``create_model(pretrained=...)`` asks for.

    Downloads go through ``huggingface_hub`` and its cache: ``HF_HOME`` moves the cache,
    ``HF_HUB_OFFLINE=1`` forbids network, ``HF_TOKEN`` opens private repositories.

    Args:
        source: Facts from the registry, ``hf-hub:org/repo`` or ``hf-hub:org/repo@revision``, or
            a folder with ``config.json`` and ``model.safetensors``.

    Returns:
        The file and its facts.

    Raises:
        OSError: The file can be neither found nor downloaded; the message says what to do.
        ValueError: The checkpoint has no weights, or its ``config.json`` cannot be read.

    Example:
        >>> checkpoint = find_checkpoint("hf-hub:timm/convnext_tiny.fb_in1k")
    """
    if isinstance(source, PretrainedConfig):
        name = ".".join(filter(None, (source.architecture, source.tag)))
        if source.file:
            return Checkpoint(Path(source.file), source)
        if not source.has_weights or not source.hf_hub_id:
            raise ValueError(
                f"There are no pretrained weights for {name!r}. See "
                "tfimm_lora.list_models(pretrained=True, include_tags=True)."
            )
        path = download(source.hf_hub_id, source.hf_hub_filename, None)
        return Checkpoint(path, source)
    if source.startswith(HUB_PREFIX):
        repo, _, revision = source[len(HUB_PREFIX) :].partition("@")
        config = download(repo, "config.json", revision or None)
        cfg = read_hub_config(config)
        cfg.hf_hub_id = repo
        path = download(repo, cfg.hf_hub_filename, revision or None)
        return Checkpoint(path, cfg, read_model_args(config))
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to load pretrained weights from.")
    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"{folder} has no {needed}. A pretrained folder holds config.json and "
                "model.safetensors, as timm writes them; for a single file use model_path=FILE."
            )
    config = folder / "config.json"
    weights = folder / "model.safetensors"
    return Checkpoint(weights, read_hub_config(config), read_model_args(config))
