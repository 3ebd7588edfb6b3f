"""Saying once which weights are not free."""

from __future__ import annotations

import warnings

from tfimm_lora.architectures.pretrained import PretrainedConfig

_FREE = {"apache", "mit", "bsd", "isc", "cc0", "unlicense"}
_shown: set[tuple[str, str]] = set()


class LicenseWarning(UserWarning):
    """Weights that were loaded are under a licence that restricts their use.

    Shown once per checkpoint in a process. Once the terms are known to you, it is silenced as any
    warning.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", tfimm_lora.weights.LicenseWarning)
    """


def is_free(license: str) -> bool:
    """Whether a licence lets everyone use the weights for everything (``""`` is unknown, too).

    Args:
        license: The hub's identifier, such as ``apache-2.0``.

    Example:
        >>> is_free("cc-by-nc-4.0")
        False
    """
    return not license or license.lower().partition("-")[0] in _FREE


def license_text(facts: PretrainedConfig) -> str:
    """Says what is known about a restrictive licence, ``""`` for a free or unknown one.

    Args:
        facts: What is known about the checkpoint.
    """
    if is_free(facts.license):
        return ""
    name = ".".join(filter(None, (facts.architecture, facts.tag)))
    commercial = (
        ", which does not allow commercial use"
        if any(word in facts.license.lower() for word in ("-nc", "noncommercial", "non-commercial"))
        else ", which restricts their use"
    )
    where = f" Its terms: https://huggingface.co/{facts.hf_hub_id}" if facts.hf_hub_id else ""
    return (
        f"The weights of {name} are under the licence {facts.license!r}{commercial}. It can "
        f"hold for models that are made from them, too.{where}"
    )


def warn_of_license(facts: PretrainedConfig) -> None:
    """Warns of a checkpoint's licence if it is not free, once per process and checkpoint.

    Args:
        facts: What is known about the checkpoint.
    """
    text = license_text(facts)
    key = (facts.hf_hub_id or facts.file or facts.architecture, text)
    if text and key not in _shown:
        _shown.add(key)
        warnings.warn(text, LicenseWarning, stacklevel=2)
