"""Differential attention: the difference of two attention maps.

Paper: Differential Transformer, arXiv:2410.05258.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from tfimm_lora.layers.attention import attention_weights, heads_first, merge_heads, split_heads
from tfimm_lora.layers.drop import create_dropout
from tfimm_lora.layers.norm import RMSNorm, create_norm

_SUB_NORM_EPSILON = 1e-5
_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialHeads:
    """Mixin for layers that attend differentially: four vectors and a norm beside the projections.

    Queries and keys have twice as many heads of half the width; a pair of neighbours gives the two
    maps whose difference weights the values of one head. A layer calls the methods in its own
    ``__init__``, ``build`` and ``call``.
    """

    num_heads: int
    attn_drop: Any
    q_norm: Any
    k_norm: Any

    def create_differential(
        self, dim: int, index: int, qk_norm: bool, norm_layer: str, norm_eps: float, drop: float
    ) -> None:
        """Creates the sublayers; ``index`` is the block's position in the model."""
        self.half_width = dim // self.num_heads // 2
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)
        self.q_norm = create_norm(norm_layer, norm_eps, "q_norm") if qk_norm else None
        self.k_norm = create_norm(norm_layer, norm_eps, "k_norm") if qk_norm else None
        self.attn_drop = create_dropout(drop, name="attn_drop")
        self.sub_norm = RMSNorm(_SUB_NORM_EPSILON, name="sub_norm")

    def build_differential(self) -> None:
        """Creates the vectors and builds the sublayers."""
        for name in _LAMBDAS:
            init = keras.initializers.RandomNormal(stddev=0.1)
            shape = (self.half_width,)
            setattr(self, name, self.add_weight(name=name, shape=shape, initializer=init))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.build((None, None, 2 * self.num_heads, self.half_width))
        self.sub_norm.build((None, self.num_heads, None, 2 * self.half_width))

    def _lambda(self) -> Any:
        q1, k1, q2, k2 = (ops.cast(getattr(self, name), "float32") for name in _LAMBDAS)
        return ops.exp(ops.sum(q1 * k1)) - ops.exp(ops.sum(q2 * k2)) + self.lambda_init

    def attend_differentially(self, q: Any, k: Any, v: Any, training: bool | None) -> Any:
        """Attends; all of (batch, tokens, dim), as is the result."""
        tokens = q.shape[1]
        q, k = split_heads(q, 2 * self.num_heads), split_heads(k, 2 * self.num_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        weights = attention_weights(heads_first(q), heads_first(k))
        weights = self.attn_drop(weights, training=training)
        weights = ops.reshape(weights, (-1, self.num_heads, 2, tokens, tokens))
        weights = weights[:, :, 0] - ops.cast(self._lambda(), weights.dtype) * weights[:, :, 1]
        x = ops.matmul(weights, heads_first(split_heads(v, self.num_heads)))
        return merge_heads(self.sub_norm(x) * (1 - self.lambda_init))


@keras.saving.register_keras_serializable(package="tfimm_lora")
class DiffAttention(DifferentialHeads, keras.layers.Layer):
    """Multi-head differential self-attention (timm's ``DiffAttention``).

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of pairs of heads; ``dim`` is a multiple of twice this number.
        index: Position of the block in the model, from 0; later blocks subtract more.
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
        ValueError: ``dim`` is not a multiple of ``2 * num_heads``.

    Example:
        >>> y = DiffAttention(384, num_heads=6, index=0)(x)     # (batch, tokens, 384)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        index: int,
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
        if dim % (2 * num_heads):
            raise ValueError(f"dim={dim} is not a multiple of 2 * num_heads={2 * num_heads}.")
        self._config = {
            "dim": dim,
            "num_heads": num_heads,
            "index": index,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "scale_norm": scale_norm,
            "proj_bias": proj_bias,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
            "attn_drop_rate": attn_drop_rate,
            "proj_drop_rate": proj_drop_rate,
        }
        self.num_heads = num_heads
        init = keras.initializers.TruncatedNormal(stddev=0.02)
        self.qkv = keras.layers.Dense(
            3 * dim, use_bias=qkv_bias, kernel_initializer=init, name="qkv"
        )
        self.create_differential(dim, index, qk_norm, norm_layer, norm_eps, attn_drop_rate)
        self.norm = create_norm(norm_layer, norm_eps, "norm") if scale_norm else None
        self.proj = keras.layers.Dense(
            dim, use_bias=proj_bias, kernel_initializer=init.clone(), name="proj"
        )
        self.proj_drop = create_dropout(proj_drop_rate, name="proj_drop")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        self.build_differential()
        for layer in (self.qkv, self.norm, self.proj):
            if layer is not None:
                layer.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        q, k, v = ops.split(self.qkv(inputs), 3, axis=-1)
        x = self.attend_differentially(q, k, v, training)
        x = self.proj(x if self.norm is None else self.norm(x))
        return self.proj_drop(x, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
