"""Adaptation methods: one file each, registered in ``METHODS``."""

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.initialization import INITIALIZATIONS
from tfimm_lora.lora.methods.lora import LoRA
from tfimm_lora.lora.methods.rslora import RSLoRA

METHODS: dict[str, type[Method]] = {"lora": LoRA, "rslora": RSLoRA}

__all__ = ["INITIALIZATIONS", "METHODS", "LoRA", "Method", "RSLoRA"]
