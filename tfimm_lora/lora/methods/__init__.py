"""Adaptation methods: one file each, registered in ``METHODS``."""

from tfimm_lora.lora.methods.adalora import AdaLoRA
from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.bitfit import BitFit
from tfimm_lora.lora.methods.boft import BOFT
from tfimm_lora.lora.methods.dora import DoRA
from tfimm_lora.lora.methods.full import Full
from tfimm_lora.lora.methods.ia3 import IA3
from tfimm_lora.lora.methods.initialization import INITIALIZATIONS
from tfimm_lora.lora.methods.linear_probe import LinearProbe
from tfimm_lora.lora.methods.ln_tuning import LNTuning
from tfimm_lora.lora.methods.loha import LoHa
from tfimm_lora.lora.methods.lokr import LoKr
from tfimm_lora.lora.methods.lora import LoRA
from tfimm_lora.lora.methods.oft import OFT
from tfimm_lora.lora.methods.qalora import QALoRA
from tfimm_lora.lora.methods.rslora import RSLoRA
from tfimm_lora.lora.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "rslora": RSLoRA,
    "adalora": AdaLoRA,
    "qalora": QALoRA,
    "vera": VeRA,
    "dora": DoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "ia3": IA3,
    "oft": OFT,
    "boft": BOFT,
    "ln_tuning": LNTuning,
    "bitfit": BitFit,
    "linear_probe": LinearProbe,
    "full": Full,
}

__all__ = ["INITIALIZATIONS", "METHODS", "LoRA", "Method", "RSLoRA"]
