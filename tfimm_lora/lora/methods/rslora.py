"""rsLoRA: W + (alpha / sqrt r) A B. Paper: arXiv:2312.03732."""

from __future__ import annotations

import math

from tfimm_lora.lora.methods.lora import LoRA


class RSLoRA(LoRA):
    """LoRA whose scaling keeps the size of the update independent of the rank."""

    @property
    def scaling(self) -> float:
        """The factor alpha / sqrt(r)."""
        return self.site.alpha / math.sqrt(self.site.rank)
