"""Fetching a file from the hub: clear errors, and nothing damaged is ever handed on."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import traceback
from pathlib import Path
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_CHECKED = ".tfimm_lora_checked"
"""Folder beside a repository's ``blobs`` in the hub's cache; one small file per checked blob."""


def download(repo: str, filename: str, revision: str | None) -> Path:
    """Fetches one file through the hub's cache; environment variables rule cache and token.

    ``huggingface_hub`` looks at the size of what arrives. Here the content of large files is
    compared with the hub's SHA-256 as well, once per file in the cache; what differs is fetched
    once more.

    Args:
        repo: ``org/repo``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; ``None`` is the main branch.

    Returns:
        The file in the cache.

    Raises:
        FileNotFoundError: Repository and revision are there, the file is not.
        OSError: The file cannot be had; the message says what to do.
    """
    path = _fetch(repo, filename, revision)
    if is_intact(path):
        return path
    if not _offline():
        path = _fetch(repo, filename, revision, force_download=True)
        if is_intact(path):
            return path
    blob = _blob(path) or path
    what = (
        f"{_where(repo, filename, revision)} is damaged: its SHA-256 is {checksum(blob)}, and the "
        f"hub announced {blob.name}."
    )
    if _offline():
        raise OSError(f"{what} Delete {blob} and {path}, and download it again with network.")
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise OSError(
        f"{what} It was fetched twice and deleted again. Try again later, or look for a proxy or "
        "mirror (HF_ENDPOINT) that changes files."
    )


def find_file(repo: str, filenames: tuple[str, ...], revision: str | None) -> str | None:
    """Returns the first of some files that a repository has, without fetching it.

    Args:
        repo: ``org/repo``.
        filenames: Paths inside the repository.
        revision: Branch, tag or commit; ``None`` is the main branch.

    Returns:
        One of the names, ``None`` if there is none of them or the hub does not say.
    """
    import huggingface_hub

    for name in filenames:
        try:
            if huggingface_hub.file_exists(repo, name, revision=revision):
                return name
        except Exception:
            return None
    return None


def _where(repo: str, filename: str, revision: str | None) -> str:
    return f"{filename} of hub repository {repo}" + (f" at revision {revision}" if revision else "")


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch(repo: str, filename: str, revision: str | None, **options: Any) -> Path:
    """Calls the hub's client and says what its errors mean."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision, **options))
    except Exception as error:
        # The client's libraries have errors of their own (httpx, requests, hf_xet); whatever it
        # was, the file could not be had.
        raise _explained(error, _where(repo, filename, revision)) from error


def _explained(error: Exception, where: str) -> OSError:
    """The error to raise for one of the hub's client's."""
    from huggingface_hub import errors

    elsewhere = "or download the file elsewhere and pass model_path=FILE"
    if _is_of_storage(error):
        return OSError(f"{where} could not be fetched. {_reason(error)}, {elsewhere}.")
    if isinstance(error, errors.GatedRepoError):
        return OSError(
            f"{where} is gated: accept its terms on the hub, then set HF_TOKEN or run "
            f"`hf auth login`. ({error})"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return OSError(
            f"{where} was not found. Check the name; for a private repository set HF_TOKEN. "
            f"({error})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return OSError(
            f"{where} could not be found: there is no such branch, tag or commit. ({error})"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return OSError(f"{where} could not be found. {_no_answer(error)}, {elsewhere}.")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(
            f"{where} could not be found: the repository has no such file. ({error})"
        )
    return OSError(f"{where} could not be fetched. {_reason(error)}, {elsewhere}.")


def _is_of_storage(error: BaseException) -> bool:
    """Whether an error comes from Xet, the service that large files are stored in.

    Its messages do not name it, and what the hub answers when the client asks for a token to it
    is not about the repository. So the functions that were left by the error are looked at.
    """
    frames = traceback.walk_tb(error.__traceback__)
    return any("xet" in frame.f_code.co_name for frame, _ in frames)


def _status(error: BaseException | None) -> int:
    """HTTP status of an error, 0 if it has none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _no_answer(error: BaseException) -> str:
    """Why a file that is not in the cache could not be looked up."""
    from huggingface_hub import constants

    cause = error.__cause__ or error
    status = _status(cause)
    if _offline():
        return (
            "HF_HUB_OFFLINE is set, and offline it has to be in the hub's cache already "
            f"({constants.HF_HUB_CACHE}); unset the variable"
        )
    if status:
        return _answered(status, cause)
    return (
        f"The hub ({constants.ENDPOINT}) does not answer ({type(cause).__name__}: {cause}), and "
        f"the file is not in the cache ({constants.HF_HUB_CACHE}); check network and proxy"
    )


def _answered(status: int, error: BaseException) -> str:
    if status == 401:
        return (
            "The hub refused the token: it is wrong or has expired; set another HF_TOKEN, run "
            f"`hf auth login`, or unset it for a public repository ({error})"
        )
    if status == 403:
        return f"The hub denies access: the token lacks the right to read this ({error})"
    if status == 429:
        return (
            "The hub's rate limit is reached; try again in some minutes, set HF_TOKEN for a higher "
            f"limit ({error})"
        )
    if status >= 500:
        return f"The hub has an error of its own (status {status}); try again later ({error})"
    return f"The hub answered with status {status} ({error}); check the name"


def _reason(error: BaseException) -> str:
    """What stopped a download, and what to do."""
    from huggingface_hub import constants

    status = _status(error)
    number = getattr(error, "errno", None)
    # Xet's errors have no number.
    if number in _FULL or "no space left" in str(error).lower():
        return (
            f"The disk of the hub's cache is full ({error}); nothing unfinished is used. Make "
            f"room in {constants.HF_HUB_CACHE}, or move the cache with HF_HOME"
        )
    if _is_of_storage(error):
        return (
            f"The hub's storage service failed ({type(error).__name__}: {error}); set "
            "HF_HUB_DISABLE_XET=1 to download without it"
        )
    if status:
        return _answered(status, error)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"The hub's cache cannot be written ({error}); move the cache to a folder of yours "
            "with HF_HOME"
        )
    return f"{type(error).__name__}: {error}. Nothing unfinished is used; try again"


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    block = bytearray(1 << 20)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def _blob(path: Path) -> Path | None:
    """The cache's blob that a file of a snapshot points to, ``None`` where it is no link.

    One step only: a blob may itself be a link into a store with other names.
    """
    if not path.is_symlink():
        return None
    blob = Path(os.path.normpath(path.parent / os.readlink(path)))
    return blob if blob.parent.name == "blobs" else None


def is_intact(path: Path) -> bool:
    """Whether a file in the hub's cache has the content that its name there promises.

    A blob of a large file is named by its SHA-256. The first check of a blob reads it and is
    noted beside it with the blob's size and time, so that later calls cost nothing.

    Args:
        path: What the hub's client returned.

    Returns:
        ``False`` only if the content is known to be another. Small files, whose names are no
        SHA-256, caches without links, and caches that cannot be written (nothing was downloaded
        into those now) pass.
    """
    blob = _blob(path)
    if blob is None or not _SHA256.fullmatch(blob.name):
        return True
    folder = blob.parent.parent
    if not os.access(folder, os.W_OK):
        return True
    state = blob.stat()
    fingerprint = f"{state.st_size} {state.st_mtime_ns}"
    note = folder / _CHECKED / blob.name
    try:
        if note.read_text(encoding="utf-8") == fingerprint:
            return True
    except OSError:
        pass
    if checksum(blob) != blob.name:
        return False
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(fingerprint, encoding="utf-8")
    except OSError:
        pass  # checked now, and again the next time
    return True
