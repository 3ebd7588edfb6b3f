"""Multi-head self-attention with a fused query-key-value projection."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfimm_lora.layers.drop import create_dropout
from tfimm_lora.layers.norm import create_norm


def attention_weights(q: Any, k: Any) -> Any:
    """Softmax of the scaled products of queries and keys, computed in float32.

    Args:
        q: Queries, (batch, heads, queries, width of a head).
        k: Keys, (batch, heads, keys, width of a head).

    Returns:
        (batch, heads, queries, keys), in the type of the queries.

    Example:
        >>> weights = attention_weights(q, k)
    """
    scores = ops.matmul(q * q.shape[-1] ** -0.5, ops.transpose(k, (0, 1, 3, 2)))
    return ops.cast(ops.softmax(ops.cast(scores, "float32"), axis=-1), q.dtype)


def split_heads(x: Any, num_heads: int) -> Any:
    """Turns (batch, tokens, heads x width) into (batch, tokens, heads, width)."""
    return ops.reshape(x, (-1, x.shape[1], num_heads, x.shape[2] // num_heads))


def heads_first(x: Any) -> Any:
    """Swaps tokens and heads: (batch, tokens, heads, width) to (batch, heads, tokens, width)."""
    return ops.transpose(x, (0, 2, 1, 3))


def merge_heads(x: Any) -> Any:
    """Turns (batch, heads, tokens, width) into (batch, tokens, heads x width)."""
    return ops.reshape(heads_first(x), (-1, x.shape[2], x.shape[1] * x.shape[3]))


@keras.saving.register_keras_serializable(package="tfimm_lora")
class Attention(keras.layers.Layer):
    """Multi-head self-attention (timm's ``Attention``).

    Paper: Attention Is All You Need, arXiv:1706.03762. ``qkv`` is one dense layer whose outputs
    are the queries, keys and values of all heads, in this order. The softmax runs in float32.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; divides ``dim``.
        qkv_bias: Whether ``qkv`` has a bias. Defaults to ``True``.
        qk_norm: Normalise queries and keys per head. Defaults to ``False``.
        scale_norm: Normalise in front of ``proj``. Defaults to ``False``.
        proj_bias: Whether ``proj`` has a bias. Defaults to ``True``.
        norm_layer: Kind of these normalisations. Defaults to ``layernorm``.
        norm_eps: Their epsilon. Defaults to 1e-6.
        attn_drop_rate: Dropout of the attention weights. Defaults to 0.0.
        proj_drop_rate: Dropout of the output. Defaults to 0.0.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.

    Example:
        >>> y = Attention(384, num_heads=6)(x)     # (batch, tokens, 384) -> (batch, tokens, 384)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        norm_layer: str = "layernorm",
        norm_eps: float = 1e-6,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}.")
        self._config = {
            "dim": dim,
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "scale_norm": scale_norm,
            "proj_bias": proj_bias,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
            "attn_drop_rate": attn_drop_rate,
            "proj_drop_rate": proj_drop_rate,
        }
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        init = keras.initializers.TruncatedNormal(stddev=0.02)
        self.qkv = keras.layers.Dense(
            3 * dim, use_bias=qkv_bias, kernel_initializer=init, name="qkv"
        )
        self.q_norm = create_norm(norm_layer, norm_eps, "q_norm") if qk_norm else None
        self.k_norm = create_norm(norm_layer, norm_eps, "k_norm") if qk_norm else None
        self.attn_drop = create_dropout(attn_drop_rate, name="attn_drop")
        self.norm = create_norm(norm_layer, norm_eps, "norm") if scale_norm else None
        self.proj = keras.layers.Dense(
            dim, use_bias=proj_bias, kernel_initializer=init.clone(), name="proj"
        )
        self.proj_drop = create_dropout(proj_drop_rate, name="proj_drop")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        self.qkv.build(input_shape)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.build(input_shape[:-1] + (self.num_heads, self.head_dim))
        if self.norm is not None:
            self.norm.build(input_shape)
        self.proj.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        q, k, v = (split_heads(t, self.num_heads) for t in ops.split(self.qkv(inputs), 3, axis=-1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        weights = attention_weights(heads_first(q), heads_first(k))
        weights = self.attn_drop(weights, training=training)
        x = merge_heads(ops.matmul(weights, heads_first(v)))
        x = self.proj(x if self.norm is None else self.norm(x))
        return self.proj_drop(x, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
