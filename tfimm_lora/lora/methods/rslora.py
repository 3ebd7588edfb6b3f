"""rsLoRA: W + (alpha / sqrt r) A B. Paper: arXiv:2312.03732."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.lora import LoRA


class RSLoRA(LoRA):
    """LoRA whose scaling keeps the size of the update independent of the rank."""

    @property
    def scaling(self) -> float:
        """The factor alpha / sqrt(r)."""
        return self.site.alpha / math.sqrt(self.site.rank)

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """LORA with ``use_rslora`` alone."""
        flags = [f for f in ("use_rslora", "use_dora", "use_qalora") if config.get(f)]
        return Method.matches_peft.__func__(cls, config) and flags == ["use_rslora"]  # type: ignore

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """LoRA's, with ``use_rslora``."""
        return {**super().peft_config(fields), "use_rslora": True}

    @classmethod
    def alpha_for(cls, scaling: float, rank: int) -> float:
        """The alpha with which a rank gives a scaling."""
        return scaling * math.sqrt(rank)
