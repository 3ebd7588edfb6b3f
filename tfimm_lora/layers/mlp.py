"""The two-layer perceptron of transformer and ConvNeXt blocks."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfimm_lora.layers.activation import get_activation
from tfimm_lora.layers.drop import create_dropout
from tfimm_lora.layers.norm import GlobalResponseNorm, create_norm


@keras.saving.register_keras_serializable(package="tfimm_lora")
class Mlp(keras.layers.Layer):
    """``fc1``, activation, optional ``norm`` or ``grn``, ``fc2``.

    timm's ``Mlp``, ``GlobalResponseNormMlp`` and, with ``gated``, ``GluMlp`` (SwiGLU,
    packed; paper: GLU Variants Improve Transformer, arXiv:2002.05202).

    Args:
        hidden_features: Width of the output of ``fc1``.
        out_features: Width of the output.
        act_layer: Activation, see :func:`~tfimm_lora.layers.get_activation`. Defaults to ``gelu``.
        use_conv: 1x1 convolutions instead of dense layers (the same mathematics; timm's
            ``conv_mlp``, which matters for the shapes in a checkpoint). Defaults to ``False``.
        use_grn: Global response normalisation in front of ``fc2``. Defaults to ``False``.
        gated: The first half of the output of ``fc1`` is activated and multiplied by the second.
            Defaults to ``False``.
        use_bias: Whether both layers have a bias. Defaults to ``True``.
        norm_layer: Kind of a normalisation in front of ``fc2``, ``""`` for none. Defaults to
            ``""``.
        norm_eps: Its epsilon. Defaults to 1e-6.
        drop_rate: Dropout after the activation and after ``fc2``. Defaults to 0.0.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = Mlp(hidden_features=768, out_features=192)(x)     # (..., 192) -> (..., 192)
    """

    def __init__(
        self,
        hidden_features: int,
        out_features: int,
        act_layer: str = "gelu",
        use_conv: bool = False,
        use_grn: bool = False,
        gated: bool = False,
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
            "use_conv": use_conv,
            "use_grn": use_grn,
            "gated": gated,
            "use_bias": use_bias,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
            "drop_rate": drop_rate,
        }

        def linear(width: int, name: str) -> keras.layers.Layer:
            init = keras.initializers.TruncatedNormal(stddev=0.02)
            if use_conv:
                return keras.layers.Conv2D(
                    width, 1, use_bias=use_bias, kernel_initializer=init, name=name
                )
            return keras.layers.Dense(width, use_bias=use_bias, kernel_initializer=init, name=name)

        self.fc1 = linear(hidden_features, "fc1")
        self.act = get_activation(act_layer)
        self.drop1 = create_dropout(drop_rate, name="drop1")
        self.norm = create_norm(norm_layer, norm_eps, "norm") if norm_layer else None
        self.grn = GlobalResponseNorm(name="grn") if use_grn else None
        self.fc2 = linear(out_features, "fc2")
        self.drop2 = create_dropout(drop_rate, name="drop2")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        width = self._config["hidden_features"] // (2 if self._config["gated"] else 1)
        hidden_shape = input_shape[:-1] + (width,)
        self.fc1.build(input_shape)
        for norm in (self.norm, self.grn):
            if norm is not None:
                norm.build(hidden_shape)
        self.fc2.build(hidden_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.fc1(inputs)
        if self._config["gated"]:
            gate, x = ops.split(x, 2, axis=-1)
            x = self.act(gate) * x
        else:
            x = self.act(x)
        x = self.drop1(x, training=training)
        for norm in (self.norm, self.grn):
            x = x if norm is None else norm(x)
        return self.drop2(self.fc2(x), training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return tuple(input_shape)[:-1] + (self._config["out_features"],)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
