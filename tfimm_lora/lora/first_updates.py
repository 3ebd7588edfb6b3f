"""First values of adapters that depend on the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.lora.methods.base import kernel_value
from tfimm_lora.quantization.format import FakeFormat
from tfimm_lora.weights.names import variable_value


def _rounded(layer: Any, kernel: np.ndarray) -> np.ndarray:
    rounded = layer.fake_quantize(ops.convert_to_tensor(kernel))
    return np.asarray(ops.convert_to_numpy(rounded))


def initialize_adapters(model: keras.Model) -> None:
    """Gives adapters the first values that depend on the kernels, where ``lora_init`` wants some.

    Functions that create or convert models do so themselves. Call it when a LoRA model has got its
    base weights in another way. Trained adapters are left alone.

    Args:
        model: A built LoRA model.

    Example:
        >>> initialize_adapters(model)
    """
    for layer in lora_layers(model):
        if isinstance(layer.kernel_format, FakeFormat):
            # A packed kernel has been through this when it got its value.
            value = variable_value(layer.kernel)
            kept = layer.kernel_to_quantize(value, partial(_rounded, layer))
            if kept is not value:
                layer.kernel.assign(kept)
        for adapter in layer.adapters.values():
            for update in adapter.updates:
                if update.initializes:
                    update.initialize(kernel_value(layer, update.site))
