"""Reading, naming, adapting and writing weights; no torch anywhere."""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names

if TYPE_CHECKING:
    from tfimm_lora.weights.hub import Checkpoint, find_checkpoint
    from tfimm_lora.weights.licence import LicenseWarning
    from tfimm_lora.weights.loading import load_safetensors
    from tfimm_lora.weights.names import iterate_layers, timm_variables
    from tfimm_lora.weights.safetensors_file import read_safetensors, save_safetensors

__all__ = [
    "Checkpoint",
    "LicenseWarning",
    "find_checkpoint",
    "iterate_layers",
    "load_safetensors",
    "read_safetensors",
    "save_safetensors",
    "timm_variables",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Checkpoint": "tfimm_lora.weights.hub",
        "LicenseWarning": "tfimm_lora.weights.licence",
        "find_checkpoint": "tfimm_lora.weights.hub",
        "iterate_layers": "tfimm_lora.weights.names",
        "load_safetensors": "tfimm_lora.weights.loading",
        "read_safetensors": "tfimm_lora.weights.safetensors_file",
        "save_safetensors": "tfimm_lora.weights.safetensors_file",
        "timm_variables": "tfimm_lora.weights.names",
    },
    globals(),
)
