"""Normalisation layers that Keras lacks, and the factory that picks one by timm's name."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class _ChannelNorm(keras.layers.Layer):
    """A normalisation over the last axis with a learned ``gamma``, computed in float32."""

    def __init__(
        self, epsilon: float = 1e-6, gamma_initializer: Any = "ones", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.gamma_initializer = keras.initializers.get(gamma_initializer)

    def build(self, input_shape: Any) -> None:
        self.gamma = self.add_weight(
            name="gamma", shape=(input_shape[-1],), initializer=self.gamma_initializer
        )

    def _normalize(self, x: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has to define _normalize.")

    def call(self, inputs: Any) -> Any:
        x = self._normalize(ops.cast(inputs, "float32")) * ops.cast(self.gamma, "float32")
        return ops.cast(x, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
        }


@keras.saving.register_keras_serializable(package="tfimm_lora")
class RMSNorm(_ChannelNorm):
    """``x / sqrt(mean(x²) + epsilon) * gamma`` over the last axis (timm's ``RmsNorm``).

    Paper: Root Mean Square Layer Normalization, arXiv:1910.07467.

    Args:
        epsilon: Added to the mean square. Defaults to 1e-6.
        gamma_initializer: Initialiser of ``gamma``. Defaults to ``ones``.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = RMSNorm(1e-6)(x)
    """

    def _normalize(self, x: Any) -> Any:
        return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.epsilon)


@keras.saving.register_keras_serializable(package="tfimm_lora")
class SimpleNorm(_ChannelNorm):
    """``x / sqrt(var(x) + epsilon) * gamma`` with the unbiased variance (timm's ``SimpleNorm``).

    ``x`` itself is not centred.

    Args:
        epsilon: Added to the variance. Defaults to 1e-6.
        gamma_initializer: Initialiser of ``gamma``. Defaults to ``ones``.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = SimpleNorm(1e-6)(x)
    """

    def _normalize(self, x: Any) -> Any:
        channels = x.shape[-1]
        variance = ops.var(x, axis=-1, keepdims=True) * (channels / (channels - 1))
        return x * ops.rsqrt(variance + self.epsilon)


@keras.saving.register_keras_serializable(package="tfimm_lora")
class GlobalResponseNorm(keras.layers.Layer):
    """Global response normalisation of ConvNeXt V2 over NHWC maps.

    ``x + beta + gamma * x * n`` where ``n`` is the L2 norm of each channel over height and width,
    divided by its mean over the channels. Paper: arXiv:2301.00808 (timm's ``GlobalResponseNorm``).

    Args:
        epsilon: Added to the channel mean. Defaults to 1e-6.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = GlobalResponseNorm()(x)     # (batch, height, width, channels)
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(name="gamma", shape=shape, initializer="zeros")
        self.beta = self.add_weight(name="beta", shape=shape, initializer="zeros")

    def call(self, inputs: Any) -> Any:
        x = ops.cast(inputs, "float32")
        norm = ops.sqrt(ops.sum(ops.square(x), axis=(1, 2), keepdims=True))
        norm = norm / (ops.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        return ops.cast(x + beta + gamma * (x * norm), inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


_NORMS: dict[str, type[keras.layers.Layer]] = {
    "layernorm": keras.layers.LayerNormalization,
    "rmsnorm": RMSNorm,
    "simplenorm": SimpleNorm,
}

NORMALIZATION_LAYERS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    GlobalResponseNorm,
    _ChannelNorm,
)
"""Layers whose ``gamma`` and ``beta`` are called ``weight`` and ``bias`` in timm."""


def create_norm(kind: str, epsilon: float, name: str, **kwargs: Any) -> keras.layers.Layer:
    """Creates a normalisation layer over the last axis.

    Args:
        kind: ``layernorm``, ``rmsnorm`` or ``simplenorm``.
        epsilon: The layer's epsilon.
        name: The layer's name.
        **kwargs: Passed on to the layer.

    Returns:
        An unbuilt layer.

    Raises:
        ValueError: The kind is unknown.

    Example:
        >>> norm = create_norm("layernorm", 1e-6, name="norm")
    """
    kind = kind.removesuffix("2d")  # timm's names for NCHW maps; ours are NHWC
    if kind not in _NORMS:
        raise ValueError(f"Unknown norm_layer {kind!r}. Use one of {', '.join(sorted(_NORMS))}.")
    return _NORMS[kind](epsilon=epsilon, name=name, **kwargs)
