"""SwiGLU with two separate input projections."""

from __future__ import annotations

from typing import Any

import keras

from tfimm_lora.layers.activation import get_activation
from tfimm_lora.layers.drop import create_dropout
from tfimm_lora.layers.norm import create_norm


@keras.saving.register_keras_serializable(package="tfimm_lora")
class SwiGLU(keras.layers.Layer):
    """``fc2(act(fc1_g(x)) * fc1_x(x))`` (timm's ``SwiGLU``).

    The mathematics of :class:`~tfimm_lora.layers.Mlp` with ``gated``, in the layout of other
    checkpoints. Paper: GLU Variants Improve Transformer, arXiv:2002.05202.

    Args:
        hidden_features: Width of the outputs of ``fc1_g`` and ``fc1_x``.
        out_features: Width of the output.
        act_layer: Activation of the gate. Defaults to ``silu``.
        use_bias: Whether the layers have a bias. Defaults to ``True``.
        norm_layer: Kind of a normalisation in front of ``fc2``, ``""`` for none. Defaults to
            ``""``.
        norm_eps: Its epsilon. Defaults to 1e-6.
        drop_rate: Dropout after the activation and after ``fc2``. Defaults to 0.0.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = SwiGLU(hidden_features=2816, out_features=1024)(x)     # (..., 1024) -> (..., 1024)
    """

    def __init__(
        self,
        hidden_features: int,
        out_features: int,
        act_layer: str = "silu",
        use_bias: bool = True,
        norm_layer: str = "",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._config = {
            "hidden_features": hidden_features,
            "out_features": out_features,
            "act_layer": act_layer,
            "use_bias": use_bias,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
            "drop_rate": drop_rate,
        }

        def dense(width: int, name: str) -> keras.layers.Layer:
            init = keras.initializers.TruncatedNormal(stddev=0.02)
            return keras.layers.Dense(width, use_bias=use_bias, kernel_initializer=init, name=name)

        self.fc1_g = dense(hidden_features, "fc1_g")
        self.fc1_x = dense(hidden_features, "fc1_x")
        self.act = get_activation(act_layer)
        self.drop1 = create_dropout(drop_rate, name="drop1")
        self.norm = create_norm(norm_layer, norm_eps, "norm") if norm_layer else None
        self.fc2 = dense(out_features, "fc2")
        self.drop2 = create_dropout(drop_rate, name="drop2")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        hidden_shape = input_shape[:-1] + (self._config["hidden_features"],)
        self.fc1_g.build(input_shape)
        self.fc1_x.build(input_shape)
        if self.norm is not None:
            self.norm.build(hidden_shape)
        self.fc2.build(hidden_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.drop1(self.act(self.fc1_g(inputs)) * self.fc1_x(inputs), training=training)
        x = x if self.norm is None else self.norm(x)
        return self.drop2(self.fc2(x), training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return tuple(input_shape)[:-1] + (self._config["out_features"],)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
