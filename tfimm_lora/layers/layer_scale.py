"""Layer scale."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="tfimm_lora")
class LayerScale(keras.layers.Layer):
    """Multiplies every channel of a residual branch by a learned ``gamma``.

    Paper: Going deeper with Image Transformers, arXiv:2103.17239 (timm's ``LayerScale``).

    Args:
        init_value: Initial value of every entry of ``gamma``. Defaults to 1e-5.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = LayerScale(1e-5)(x)     # (..., channels) -> (..., channels)
    """

    def __init__(self, init_value: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_value = init_value

    def build(self, input_shape: Any) -> None:
        self.gamma = self.add_weight(
            name="gamma",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.init_value),
        )

    def call(self, inputs: Any) -> Any:
        return inputs * ops.cast(self.gamma, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "init_value": self.init_value}
