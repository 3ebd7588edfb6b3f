"""What this package records in an adapter's weights file; it may be from a stranger as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfimm_lora.architectures.config import make_config
from tfimm_lora.lora.config import LoRAConfig, split_lora_values
from tfimm_lora.lora.peft.config import MAX_RANK
from tfimm_lora.weights.patterns import is_regex
from tfimm_lora.weights.regex import check_regex


def check_own(own: Mapping[str, Any], source: str) -> None:
    """Raises unless the recorded fields are some that this package writes.

    Args:
        own: The record; empty in files of PEFT.
        source: Where it is from, for messages.

    Raises:
        ValueError: Says what is wrong.
    """
    if not own:
        return
    kinds = {"version": str, "model": str, "base_sha256": str, "lora": dict, "config": dict}
    for key, kind in kinds.items():
        if not isinstance(own.get(key), kind):
            raise ValueError(
                f"{source}: what tfimm_lora recorded is damaged: {key} has to be a "
                f"{kind.__name__}, found {str(own.get(key))[:80]!r}."
            )
    lora = own["lora"]
    strange = split_lora_values(lora)[1]
    if strange:
        raise ValueError(f"{source}: {next(iter(strange))!r} is no field of an adapter.")
    for key in ("lora_rank_pattern", "lora_alpha_pattern", "lora_options"):
        if not isinstance(lora.get(key, {}), dict):
            raise ValueError(f"{source}: {key} has to be an object, found {str(lora[key])[:80]!r}.")
    try:
        fields = make_config(LoRAConfig, {}, dict(lora))
        ranks = [fields.lora_rank, *fields.lora_rank_pattern.values()]
        if max(ranks) > MAX_RANK:
            raise ValueError(f"the rank {max(ranks):,} is too large, at most {MAX_RANK:,} can be")
        targets = fields.lora_targets or ()
        patterns = targets.split() if isinstance(targets, str) else [*targets]
        for pattern in (*patterns, *fields.lora_rank_pattern, *fields.lora_alpha_pattern):
            if not isinstance(pattern, str) or is_regex(pattern):
                check_regex(pattern)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{source}: {error}") from error
