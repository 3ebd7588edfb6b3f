"""The blocks of vision transformers, under timm's names for ``block_fn``."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfimm_lora.architectures.vit_config import ViTConfig
from tfimm_lora.layers import (
    Attention,
    DiffAttention,
    LayerScale,
    Mlp,
    SwiGLU,
    create_drop_path,
    create_dropout,
    create_norm,
    get_activation,
)
from tfimm_lora.layers.attention import attention_weights, heads_first, merge_heads, split_heads
from tfimm_lora.layers.diff_attention import DifferentialHeads


def _attention(cfg: ViTConfig, index: int) -> keras.layers.Layer:
    arguments: dict[str, Any] = {
        "qkv_bias": cfg.qkv_bias,
        "qk_norm": cfg.qk_norm,
        "scale_norm": cfg.scale_attn_norm,
        "proj_bias": cfg.proj_bias,
        "norm_layer": cfg.norm_layer,
        "norm_eps": cfg.norm_eps,
        "attn_drop_rate": cfg.attn_drop_rate,
        "proj_drop_rate": cfg.proj_drop_rate,
        "name": "attn",
    }
    if cfg.attn_layer == "diff":
        return DiffAttention(cfg.embed_dim, cfg.num_heads, index, **arguments)
    return Attention(cfg.embed_dim, cfg.num_heads, **arguments)


def _mlp(cfg: ViTConfig) -> keras.layers.Layer:
    arguments: dict[str, Any] = {
        "act_layer": cfg.act_layer,
        "use_bias": cfg.proj_bias,
        "norm_layer": cfg.norm_layer if cfg.scale_mlp_norm else "",
        "norm_eps": cfg.norm_eps,
        "drop_rate": cfg.proj_drop_rate,
        "name": "mlp",
    }
    hidden = int(cfg.embed_dim * cfg.mlp_ratio)
    if cfg.mlp_layer == "swiglu":
        return SwiGLU(hidden, cfg.embed_dim, **arguments)
    return Mlp(hidden, cfg.embed_dim, gated=cfg.mlp_layer == "glu", **arguments)


def _norm(cfg: ViTConfig, name: str, **kwargs: Any) -> keras.layers.Layer:
    return create_norm(cfg.norm_layer, cfg.norm_eps, name, **kwargs)


def _layer_scale(cfg: ViTConfig, name: str) -> LayerScale | None:
    # timm skips layer scale when its initial value is zero or None.
    return LayerScale(cfg.init_values, name=name) if cfg.init_values else None


class _ViTLayer(keras.layers.Layer):
    """A layer from tokens to tokens of the same shape."""

    def _build_all(self, input_shape: Any, *layers: keras.layers.Layer | None) -> None:
        for layer in layers:
            if layer is not None:
                layer.build(tuple(input_shape))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class ViTBlock(_ViTLayer):
    """Pre-norm attention and MLP with residuals (timm's ``Block``)."""

    def __init__(self, cfg: ViTConfig, index: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm1 = _norm(cfg, "norm1")
        self.attn = _attention(cfg, index)
        self.ls1 = _layer_scale(cfg, "ls1")
        self.drop_path1 = create_drop_path(drop_path, name="drop_path1")
        self.norm2 = _norm(cfg, "norm2")
        self.mlp = _mlp(cfg)
        self.ls2 = _layer_scale(cfg, "ls2")
        self.drop_path2 = create_drop_path(drop_path, name="drop_path2")

    def build(self, input_shape: Any) -> None:
        self._build_all(
            input_shape, self.norm1, self.attn, self.ls1, self.norm2, self.mlp, self.ls2
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.attn(self.norm1(inputs), training=training)
        x = x if self.ls1 is None else self.ls1(x)
        inputs = inputs + self.drop_path1(x, training=training)
        x = self.mlp(self.norm2(inputs), training=training)
        x = x if self.ls2 is None else self.ls2(x)
        return inputs + self.drop_path2(x, training=training)


class ResPostBlock(_ViTLayer):
    """Attention and MLP, each normalised in front of its residual (timm's ``ResPostBlock``).

    Paper: Swin Transformer V2, arXiv:2111.09883. ``init_values`` are the initial norm weights.
    """

    def __init__(self, cfg: ViTConfig, index: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        arguments: dict[str, Any] = {}
        if cfg.init_values is not None:
            arguments["gamma_initializer"] = keras.initializers.Constant(cfg.init_values)
        self.attn = _attention(cfg, index)
        self.norm1 = _norm(cfg, "norm1", **arguments)
        self.drop_path1 = create_drop_path(drop_path, name="drop_path1")
        self.mlp = _mlp(cfg)
        self.norm2 = _norm(cfg, "norm2", **arguments)
        self.drop_path2 = create_drop_path(drop_path, name="drop_path2")

    def build(self, input_shape: Any) -> None:
        self._build_all(input_shape, self.attn, self.norm1, self.mlp, self.norm2)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.norm1(self.attn(inputs, training=training))
        inputs = inputs + self.drop_path1(x, training=training)
        x = self.norm2(self.mlp(inputs, training=training))
        return inputs + self.drop_path2(x, training=training)


class _ParallelBlock(_ViTLayer):
    """What both parallel scaling blocks share: one input layer for MLP, queries, keys and values.

    Without a bias on queries, keys and values the MLP has one of its own, ``mlp_bias``.
    """

    def __init__(self, cfg: ViTConfig, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = cfg.embed_dim
        self.num_heads = cfg.num_heads
        self.hidden = int(cfg.embed_dim * cfg.mlp_ratio)
        self.has_mlp_bias = not cfg.qkv_bias
        self.in_norm = _norm(cfg, "in_norm")
        self.in_proj = self._dense(self.hidden + 3 * self.dim, cfg.qkv_bias, "in_proj")
        self.mlp_act = get_activation(cfg.act_layer)
        self.mlp_drop = create_dropout(cfg.proj_drop_rate, name="mlp_drop")
        self.ls = None
        if cfg.init_values is not None:
            self.ls = LayerScale(cfg.init_values, name="ls")
        self.drop_path = create_drop_path(drop_path, name="drop_path")

    @staticmethod
    def _dense(width: int, use_bias: bool, name: str) -> keras.layers.Layer:
        init = keras.initializers.TruncatedNormal(stddev=0.02)
        return keras.layers.Dense(width, use_bias=use_bias, kernel_initializer=init, name=name)

    def build(self, input_shape: Any) -> None:
        self._build_all(input_shape, self.in_norm, self.in_proj, self.ls)
        self.mlp_bias = None
        if self.has_mlp_bias:
            self.mlp_bias = self.add_weight(
                name="mlp_bias", shape=(self.hidden,), initializer="zeros"
            )

    def _attend(self, q: Any, k: Any, v: Any, training: bool | None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has to define _attend.")

    def _project(self, attended: Any, hidden: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has to define _project.")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.in_proj(self.in_norm(inputs))
        ends = [self.hidden + i * self.dim for i in range(3)]
        hidden, q, k, v = ops.split(x, ends, axis=-1)
        if self.mlp_bias is not None:
            hidden = hidden + ops.cast(self.mlp_bias, hidden.dtype)
        hidden = self.mlp_drop(self.mlp_act(hidden), training=training)
        x = self._project(self._attend(q, k, v, training), hidden)
        x = x if self.ls is None else self.ls(x)
        return inputs + self.drop_path(x, training=training)


class ParallelScalingBlock(_ParallelBlock):
    """Attention and MLP side by side behind one input layer (timm's ``ParallelScalingBlock``).

    Paper: Scaling Vision Transformers to 22 Billion Parameters, arXiv:2302.05442.
    """

    def __init__(self, cfg: ViTConfig, index: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(cfg, drop_path, **kwargs)
        self.q_norm = _norm(cfg, "q_norm") if cfg.qk_norm else None
        self.k_norm = _norm(cfg, "k_norm") if cfg.qk_norm else None
        self.attn_drop = create_dropout(cfg.attn_drop_rate, name="attn_drop")
        self.attn_out_proj = self._dense(self.dim, cfg.proj_bias, "attn_out_proj")
        self.mlp_out_proj = self._dense(self.dim, cfg.proj_bias, "mlp_out_proj")

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        heads = (None, None, self.num_heads, self.dim // self.num_heads)
        self._build_all(heads, self.q_norm, self.k_norm)
        self.attn_out_proj.build(tuple(input_shape))
        self.mlp_out_proj.build(tuple(input_shape)[:-1] + (self.hidden,))

    def _attend(self, q: Any, k: Any, v: Any, training: bool | None) -> Any:
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        weights = attention_weights(heads_first(q), heads_first(k))
        weights = self.attn_drop(weights, training=training)
        return merge_heads(ops.matmul(weights, heads_first(v)))

    def _project(self, attended: Any, hidden: Any) -> Any:
        return self.attn_out_proj(attended) + self.mlp_out_proj(hidden)


class DiffParallelScalingBlock(DifferentialHeads, _ParallelBlock):
    """Differential attention and MLP side by side (timm's ``DiffParallelScalingBlock``).

    One input layer, and one output layer on both results. Papers: arXiv:2302.05442 and
    arXiv:2410.05258.
    """

    def __init__(self, cfg: ViTConfig, index: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(cfg, drop_path, **kwargs)
        self.create_differential(
            cfg.embed_dim, index, cfg.qk_norm, cfg.norm_layer, cfg.norm_eps, cfg.attn_drop_rate
        )
        self.out_proj = self._dense(self.dim, cfg.proj_bias, "out_proj")

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.build_differential()
        self.out_proj.build(tuple(input_shape)[:-1] + (self.dim + self.hidden,))

    def _attend(self, q: Any, k: Any, v: Any, training: bool | None) -> Any:
        return self.attend_differentially(q, k, v, training)

    def _project(self, attended: Any, hidden: Any) -> Any:
        return self.out_proj(ops.concatenate([attended, hidden], axis=-1))


class _Branch(_ViTLayer):
    """``norm``, attention or MLP, layer scale: one of several that are summed."""

    def __init__(
        self, cfg: ViTConfig, branch: keras.layers.Layer, drop_path: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.norm = _norm(cfg, "norm")
        self.branch = branch
        self.ls = _layer_scale(cfg, "ls")
        self.drop_path = create_drop_path(drop_path, name="drop_path")

    def build(self, input_shape: Any) -> None:
        self._build_all(input_shape, self.norm, self.branch, self.ls)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.branch(self.norm(inputs), training=training)
        x = x if self.ls is None else self.ls(x)
        return self.drop_path(x, training=training)


class ParallelThingsBlock(_ViTLayer):
    """Two attentions in parallel, then two MLPs in parallel (timm's ``ParallelThingsBlock``).

    Paper: Three things everyone should know about Vision Transformers, arXiv:2203.09795.
    """

    def __init__(self, cfg: ViTConfig, index: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attns = [
            _Branch(cfg, _attention(cfg, index), drop_path, name=f"attns_{j}") for j in range(2)
        ]
        self.ffns = [_Branch(cfg, _mlp(cfg), drop_path, name=f"ffns_{j}") for j in range(2)]

    def build(self, input_shape: Any) -> None:
        self._build_all(input_shape, *self.attns, *self.ffns)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = inputs
        for branches in (self.attns, self.ffns):
            x = x + sum(branch(x, training=training) for branch in branches)
        return x


BLOCKS: dict[str, type[keras.layers.Layer]] = {
    "Block": ViTBlock,
    "ResPostBlock": ResPostBlock,
    "ParallelScalingBlock": ParallelScalingBlock,
    "DiffParallelScalingBlock": DiffParallelScalingBlock,
    "ParallelThingsBlock": ParallelThingsBlock,
}
"""Block classes by the names that ``ViTConfig.block_fn`` takes."""
