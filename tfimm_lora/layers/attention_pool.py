"""Attention pooling: a learned query reads all tokens."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfimm_lora.layers.attention import attention_weights, heads_first, merge_heads, split_heads
from tfimm_lora.layers.mlp import Mlp
from tfimm_lora.layers.norm import create_norm


@keras.saving.register_keras_serializable(package="tfimm_lora")
class AttentionPoolLatent(keras.layers.Layer):
    """Pools tokens by attention of one learned query, ``latent`` (timm's ``AttentionPoolLatent``).

    Multi-head attention pooling of SigLIP: attention, projection, and an MLP with residual.
    Papers: Set Transformer, arXiv:1810.00825; Scaling Vision Transformers, arXiv:2106.04560.

    Args:
        dim: Width of the tokens and of the output.
        num_heads: Number of heads; divides ``dim``.
        mlp_ratio: Hidden width of the MLP over ``dim``. Defaults to 4.0.
        act_layer: Activation of the MLP. Defaults to ``gelu``.
        norm_layer: Kind of the normalisation in front of the MLP. Defaults to ``layernorm``.
        norm_eps: Its epsilon. Defaults to 1e-6.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Example:
        >>> y = AttentionPoolLatent(768, num_heads=12)(x)     # (batch, tokens, 768) -> (batch, 768)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        act_layer: str = "gelu",
        norm_layer: str = "layernorm",
        norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}.")
        self._config = {
            "dim": dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "act_layer": act_layer,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
        }
        self.dim = dim
        self.num_heads = num_heads

        def dense(width: int, name: str) -> keras.layers.Layer:
            init = keras.initializers.TruncatedNormal(stddev=0.02)
            return keras.layers.Dense(width, kernel_initializer=init, name=name)

        self.q = dense(dim, "q")
        self.kv = dense(2 * dim, "kv")
        self.proj = dense(dim, "proj")
        self.norm = create_norm(norm_layer, norm_eps, "norm")
        self.mlp = Mlp(int(dim * mlp_ratio), dim, act_layer=act_layer, name="mlp")

    def build(self, input_shape: Any) -> None:
        self.latent = self.add_weight(
            name="latent",
            shape=(1, 1, self.dim),
            initializer=keras.initializers.TruncatedNormal(stddev=self.dim**-0.5),
        )
        for layer in (self.q, self.kv, self.proj, self.norm, self.mlp):
            layer.build((None, 1, self.dim))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        # One query serves all images, so it is projected once and not per image.
        q = split_heads(self.q(ops.cast(self.latent, inputs.dtype)), self.num_heads)
        k, v = (split_heads(t, self.num_heads) for t in ops.split(self.kv(inputs), 2, axis=-1))
        weights = attention_weights(heads_first(q), heads_first(k))
        x = self.proj(merge_heads(ops.matmul(weights, heads_first(v))))
        x = x + self.mlp(self.norm(x), training=training)
        return x[:, 0]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (input_shape[0], self.dim)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
