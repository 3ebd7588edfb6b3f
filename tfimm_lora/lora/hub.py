"""Sharing adapters on the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from tfimm_lora.lora.adapter_state import adapter_state
from tfimm_lora.lora.adapters import save_adapter
from tfimm_lora.lora.config import check_adapter_name
from tfimm_lora.lora.model_card import CARD_FILE, adapter_card, is_generated
from tfimm_lora.lora.peft.reading import CONFIG_FILE
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.weights.hub import HUB_PREFIX, split_source

# What a repository may hold beside an adapter.
_HARMLESS = re.compile(r"\.gitattributes|\.gitignore|LICENSE(\.\w+)?|.*\.md|.*\.(png|jpe?g|svg)")


def push_adapter_to_hub(
    model: keras.Model,
    repo_id: str,
    *,
    name: str = "default",
    private: bool = False,
    commit_message: str = "Upload adapter",
    metrics: Mapping[str, Any] | None = None,
    data: str = "",
    token: str | None = None,
) -> str:
    """Uploads an adapter with a card, in one commit, as PEFT's files.

    ``load_adapter(base, "hf-hub:org/repo")`` loads it, and so does PEFT. The repository is created
    if there is none. One that has an adapter gets the new one; a card there that somebody wrote or
    edited stays as it is.

    Args:
        model: A LoRA model, merged or not.
        repo_id: ``org/repo``, with or without ``hf-hub:`` in front.
        name: Which of the model's adapters. Its files are at the top of the repository whatever
            its name. Defaults to ``default``, or to the model's only one.
        private: Whether a new repository is private. Defaults to ``False``.
        commit_message: Defaults to ``Upload adapter``.
        metrics: Results for the card, such as ``{"accuracy": 0.93}``. Defaults to ``None``.
        data: What the adapter was trained on, for the card. Defaults to nothing.
        token: Token that may write; by default that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The model has no such adapter, the name is none of a repository, the repository
            holds something else than an adapter, or is public although ``private=True``.
        OSError: The hub cannot be reached or does not allow it; nothing was changed there, except
            perhaps that the repository, empty, was created.

    Example:
        >>> push_adapter_to_hub(model, "me/cats-lora", metrics={"accuracy": 0.93}, data="Cats")
    """
    prefix, place = split_source(str(repo_id))
    if prefix not in ("", HUB_PREFIX) or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise ValueError(f"{repo_id!r} is no name of a repository on the hub, which is org/repo.")
    check_adapter_name(name)
    model = model.backbone if isinstance(model, FeatureExtractor) else model
    with tempfile.TemporaryDirectory(prefix="tfimm_lora_push_") as temporary:
        folder = save_adapter(model, temporary, name)
        state = adapter_state(model)
        chosen = name if name in state.fields else next(iter(state.fields))
        card = adapter_card(model, chosen, place, metrics, data)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        return _upload(folder, place, private, commit_message, token)


def _upload(folder: Path, repo: str, private: bool, message: str, token: str | None) -> str:
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f"The adapter cannot be uploaded to {repo}: HF_HUB_OFFLINE is set. Unset it, or use "
            "lora.save_adapter(model, folder)."
        )
    api = HfApi(token=token)
    try:
        # A failed look-up is no answer yet: only creating tells whether the token may write.
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        _check_content(repo, info, private)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            # A commit of somebody else's in between makes this one fail as a whole.
            parent_commit=info.sha,
            ignore_patterns=None if _may_replace_card(api, repo, info) else [CARD_FILE],
        )
    except errors.HfHubHTTPError as error:
        raise OSError(_answered(repo, error)) from error
    except (ValueError, errors.EntryNotFoundError):
        raise
    except Exception as error:
        # The client's libraries have errors of their own (httpx, requests, hf_xet).
        raise OSError(
            f"The adapter could not be uploaded to {repo}: the hub ({constants.ENDPOINT}) does not "
            f"answer ({type(error).__name__}: {error}). Check network and proxy, or use "
            "lora.save_adapter(model, folder)."
        ) from error
    return str(commit.commit_url)


def _check_content(repo: str, info: Any, private: bool) -> None:
    files = [file.rfilename for file in info.siblings or ()]
    others = [file for file in files if not _HARMLESS.fullmatch(file)]
    if others and CONFIG_FILE not in files:
        raise ValueError(
            f"The repository {repo} exists and holds something else than an adapter "
            f"({', '.join(sorted(others)[:3])}). Choose another name."
        )
    if private and info.private is False:
        raise ValueError(
            f"The repository {repo} exists and is public, and private=True makes only a new one "
            "private. Choose another name, or make it private on the hub first."
        )


def _may_replace_card(api: Any, repo: str, info: Any) -> bool:
    """Whether the repository has no card, or one that was generated and not edited."""
    if CARD_FILE not in [file.rfilename for file in info.siblings or ()]:
        return True
    with tempfile.TemporaryDirectory(prefix="tfimm_lora_card_") as folder:
        path = api.hf_hub_download(repo, CARD_FILE, revision=info.sha, local_dir=folder)
        if is_generated(Path(path).read_text(encoding="utf-8", errors="replace")):
            return True
    warnings.warn(
        f"{repo} has a {CARD_FILE} that somebody wrote or edited; it stays as it is. Delete it to "
        "get a new one.",
        stacklevel=4,
    )
    return False


def _answered(repo: str, error: Any) -> str:
    """What the hub's answer means and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    meaning = {
        401: "it asks for a token, or the token is wrong or has expired. Set HF_TOKEN, run `hf "
        "auth login`, or pass token=",
        403: f"the token may not write to {repo.partition('/')[0]!r}. Use a token with the right "
        "to write, or another organisation",
        404: "there is no such organisation or repository, or the token may not see it",
        409: "the name is taken, or somebody else changed the repository at the same time. Try "
        "again, or choose another name",
        412: "somebody else changed the repository at the same time. Try again",
        429: "its rate limit is reached. Try again in some minutes",
    }.get(status, "see its message" if status < 500 else "it has an error of its own. Try later")
    return (
        f"The adapter could not be uploaded to {repo}: the hub answered with status {status}: "
        f"{meaning}. ({error})"
    )
