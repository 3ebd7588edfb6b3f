"""Formats in which frozen kernels are stored: fake-quantised, or packed to 8 or 4 bits."""

from typing import TYPE_CHECKING

from tfimm_lora._lazy import lazy_names

if TYPE_CHECKING:
    from tfimm_lora.quantization.format import (
        FakeFormat,
        KernelFormat,
        PackedFormat,
        pack_nibbles,
        unpack_nibbles,
    )
    from tfimm_lora.quantization.integer import FakeIntegerFormat, IntegerFormat
    from tfimm_lora.quantization.layer import StoresKernel
    from tfimm_lora.quantization.layers import (
        QuantizedConv2D,
        QuantizedDense,
        QuantizedDepthwiseConv2D,
        QuantizedEinsumDense,
    )
    from tfimm_lora.quantization.models import (
        QuantizationConfig,
        QuantizedConvNeXt,
        QuantizedConvNeXtConfig,
        QuantizedModel,
        QuantizedViT,
        QuantizedViTConfig,
        convert_to_quantized_model,
        quantized_architecture,
        quantized_base_architecture,
        register_quantized_architecture,
    )
    from tfimm_lora.quantization.nf4 import NF4
    from tfimm_lora.quantization.registry import FORMATS, kernel_format
    from tfimm_lora.quantization.row_scaled import RowScaledFormat
    from tfimm_lora.quantization.stored_kernel import StoredKernel

_NAMES = {
    "tfimm_lora.quantization.format": (
        "FakeFormat",
        "KernelFormat",
        "PackedFormat",
        "pack_nibbles",
        "unpack_nibbles",
    ),
    "tfimm_lora.quantization.integer": ("FakeIntegerFormat", "IntegerFormat"),
    "tfimm_lora.quantization.layer": ("StoresKernel",),
    "tfimm_lora.quantization.layers": (
        "QuantizedConv2D",
        "QuantizedDense",
        "QuantizedDepthwiseConv2D",
        "QuantizedEinsumDense",
    ),
    "tfimm_lora.quantization.models": (
        "QuantizationConfig",
        "QuantizedConvNeXt",
        "QuantizedConvNeXtConfig",
        "QuantizedModel",
        "QuantizedViT",
        "QuantizedViTConfig",
        "convert_to_quantized_model",
        "quantized_architecture",
        "quantized_base_architecture",
        "register_quantized_architecture",
    ),
    "tfimm_lora.quantization.nf4": ("NF4",),
    "tfimm_lora.quantization.registry": ("FORMATS", "kernel_format"),
    "tfimm_lora.quantization.row_scaled": ("RowScaledFormat",),
    "tfimm_lora.quantization.stored_kernel": ("StoredKernel",),
}

__all__ = [
    "FORMATS",
    "NF4",
    "FakeFormat",
    "FakeIntegerFormat",
    "IntegerFormat",
    "KernelFormat",
    "PackedFormat",
    "QuantizationConfig",
    "QuantizedConv2D",
    "QuantizedConvNeXt",
    "QuantizedConvNeXtConfig",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "QuantizedEinsumDense",
    "QuantizedModel",
    "QuantizedViT",
    "QuantizedViTConfig",
    "RowScaledFormat",
    "StoredKernel",
    "StoresKernel",
    "convert_to_quantized_model",
    "kernel_format",
    "pack_nibbles",
    "quantized_architecture",
    "quantized_base_architecture",
    "register_quantized_architecture",
    "unpack_nibbles",
]

__getattr__, __dir__ = lazy_names(
    __name__, {name: module for module, names in _NAMES.items() for name in names}, globals()
)
