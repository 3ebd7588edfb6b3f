"""Vision transformers with plain pre-norm blocks: ViT, DeiT, DINOv2 and their like.

Papers: An Image is Worth 16x16 Words, arXiv:2010.11929; DeiT, arXiv:2012.12877; DINOv2,
arXiv:2304.07193; registers, arXiv:2309.16588. Layer names and numerics follow timm's
``vision_transformer.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.base import ImageModel
from tfimm_lora.architectures.config import ModelConfig
from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.layers import (
    Attention,
    Dropout,
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    create_norm,
)
from tfimm_lora.layers.resample import resample_patch_kernel, resample_position_table


@dataclasses.dataclass
class ViTConfig(ModelConfig):
    """Configuration of :class:`ViT`; fields beyond the base class carry timm's names.

    Attributes:
        patch_size: Side of a patch in pixels.
        embed_dim: Width of a token.
        depth: Number of blocks.
        num_heads: Number of attention heads; divides ``embed_dim``.
        mlp_ratio: Hidden width of a block's MLP over ``embed_dim``.
        qkv_bias: Bias of the query-key-value projections.
        qk_norm: Normalise queries and keys.
        proj_bias: Bias of the other projections of a block.
        init_values: Initial layer scale, ``None`` for no layer scale.
        class_token: Whether there is a class token.
        no_embed_class: Position embeddings for patches only.
        reg_tokens: Number of register tokens.
        pre_norm: Normalise in front of the blocks (and no bias in the patch embedding).
        final_norm: Normalise behind the blocks.
        fc_norm: Normalise behind pooling instead; ``None`` does so for average pooling.
        global_pool: ``token`` (the class token), ``avg`` (patch tokens), or ``""`` for no pooling.
        dynamic_img_size: Accept images of any size by resampling the position table in each call.
        act_layer: Activation of the MLPs.
        mlp_layer: ``mlp``, or ``glu`` for gated MLPs (SwiGLU of the giant DINOv2).
        norm_layer: ``layernorm``, ``rmsnorm`` or ``simplenorm``.
        norm_eps: Epsilon of all normalisations.
        drop_rate: Dropout in front of the classifier.
        pos_drop_rate: Dropout behind the position embedding.
        proj_drop_rate: Dropout behind the projections of a block.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; earlier blocks have less.
        first_conv: See the base class.
        classifier: See the base class.

    Raises:
        ValueError: Sizes do not divide, or the pooling contradicts the tokens.

    Example:
        >>> cfg = ViTConfig(embed_dim=64, depth=2, num_heads=2, input_size=(32, 32), patch_size=8)
    """

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    global_pool: str = "token"
    dynamic_img_size: bool = False
    act_layer: str = "gelu"
    mlp_layer: str = "mlp"
    norm_layer: str = "layernorm"
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    first_conv: str = "patch_embed.proj"
    classifier: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        # As in timm, a rest of pixels at the lower and right border is not seen.
        if any(size < self.patch_size for size in self.input_size):
            raise ValueError(
                f"input_size={tuple(self.input_size)} is smaller than a patch of "
                f"{self.patch_size} pixels."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}."
            )
        if self.global_pool not in ("token", "avg", ""):
            raise ValueError(
                f"global_pool has to be 'token', 'avg' or '', found {self.global_pool!r}."
            )
        if self.mlp_layer not in ("mlp", "glu"):
            raise ValueError(f"mlp_layer has to be 'mlp' or 'glu', found {self.mlp_layer!r}.")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True. Use global_pool='avg'.")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches along height and width."""
        return (self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens in front of the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def num_prefix_positions(self) -> int:
        """Number of rows of the position table that belong to prefix tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def uses_fc_norm(self) -> bool:
        """Whether the last normalisation comes behind pooling."""
        wanted = self.global_pool == "avg" if self.fc_norm is None else self.fc_norm
        return self.final_norm and wanted


class ViTBlock(keras.layers.Layer):
    """Pre-norm attention and MLP with residuals (timm's ``Block``)."""

    def __init__(self, cfg: ViTConfig, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm1 = create_norm(cfg.norm_layer, cfg.norm_eps, "norm1")
        self.attn = Attention(
            cfg.embed_dim,
            cfg.num_heads,
            qkv_bias=cfg.qkv_bias,
            qk_norm=cfg.qk_norm,
            proj_bias=cfg.proj_bias,
            norm_layer=cfg.norm_layer,
            norm_eps=cfg.norm_eps,
            attn_drop_rate=cfg.attn_drop_rate,
            proj_drop_rate=cfg.proj_drop_rate,
            name="attn",
        )
        # timm skips layer scale when its initial value is zero or None.
        self.ls1 = LayerScale(cfg.init_values, name="ls1") if cfg.init_values else None
        self.drop_path1 = DropPath(drop_path, name="drop_path1")
        self.norm2 = create_norm(cfg.norm_layer, cfg.norm_eps, "norm2")
        self.mlp = Mlp(
            int(cfg.embed_dim * cfg.mlp_ratio),
            cfg.embed_dim,
            act_layer=cfg.act_layer,
            gated=cfg.mlp_layer == "glu",
            use_bias=cfg.proj_bias,
            drop_rate=cfg.proj_drop_rate,
            name="mlp",
        )
        self.ls2 = LayerScale(cfg.init_values, name="ls2") if cfg.init_values else None
        self.drop_path2 = DropPath(drop_path, name="drop_path2")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        for layer in (self.norm1, self.attn, self.ls1, self.norm2, self.mlp, self.ls2):
            if layer is not None:
                layer.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.attn(self.norm1(inputs), training=training)
        x = x if self.ls1 is None else self.ls1(x)
        inputs = inputs + self.drop_path1(x, training=training)
        x = self.mlp(self.norm2(inputs), training=training)
        x = x if self.ls2 is None else self.ls2(x)
        return inputs + self.drop_path2(x, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@keras_serializable
class ViT(ImageModel):
    """A vision transformer.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model`` (``name``, ``dtype``).

    Example:
        >>> model = tfimm_lora.create_model("vit_tiny_patch16_224", nb_classes=10)
        >>> logits = model(model.dummy_inputs)     # (1, 10)
    """

    cfg_class = ViTConfig

    def __init__(self, cfg: ViTConfig, **kwargs: Any) -> None:
        super().__init__(**{"name": "vit", **kwargs})
        self.cfg = cfg
        self.patch_embed = PatchEmbed(
            cfg.patch_size, cfg.embed_dim, use_bias=not cfg.pre_norm, name="patch_embed"
        )
        self.pos_drop = Dropout(cfg.pos_drop_rate, name="pos_drop")

        def norm(name: str, wanted: bool) -> keras.layers.Layer | None:
            return create_norm(cfg.norm_layer, cfg.norm_eps, name) if wanted else None

        self.norm_pre = norm("norm_pre", cfg.pre_norm)
        rates = np.linspace(0.0, cfg.drop_path_rate, cfg.depth)
        self.blocks = [ViTBlock(cfg, float(r), name=f"blocks_{i}") for i, r in enumerate(rates)]
        self.norm = norm("norm", cfg.final_norm and not cfg.uses_fc_norm)
        self.fc_norm = norm("fc_norm", cfg.uses_fc_norm)
        self.head_drop = Dropout(cfg.drop_rate, name="head_drop")
        self.head = None
        if cfg.nb_classes:
            init = keras.initializers.TruncatedNormal(stddev=0.02)
            self.head = keras.layers.Dense(cfg.nb_classes, kernel_initializer=init, name="head")

    def build(self, input_shape: Any) -> None:
        cfg = self.cfg
        self.patch_embed.build((None, *cfg.input_size, cfg.in_channels))
        tiny = keras.initializers.RandomNormal(stddev=1e-6)
        self.cls_token = self.reg_token = None
        if cfg.class_token:
            self.cls_token = self.add_weight(
                name="cls_token", shape=(1, 1, cfg.embed_dim), initializer=tiny
            )
        if cfg.reg_tokens:
            self.reg_token = self.add_weight(
                name="reg_token", shape=(1, cfg.reg_tokens, cfg.embed_dim), initializer=tiny.clone()
            )
        rows = cfg.num_prefix_positions + cfg.grid_size[0] * cfg.grid_size[1]
        self.pos_embed = self.add_weight(
            name="pos_embed",
            shape=(1, rows, cfg.embed_dim),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        )
        tokens = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
        shape = (None, tokens, cfg.embed_dim)
        for layer in (self.norm_pre, *self.blocks, self.norm):
            if layer is not None:
                layer.build(shape)
        pooled = (None, cfg.embed_dim) if cfg.global_pool else shape
        for layer in (self.fc_norm, self.head):
            if layer is not None:
                layer.build(pooled)

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return self.cfg.embed_dim

    @property
    def feature_names(self) -> list[str]:
        """Names of the features that a call with ``return_features=True`` returns."""
        blocks = [f"block_{i}" for i in range(self.cfg.depth)]
        return ["patch_embedding", *blocks, "features_all", "features", "logits"]

    def _positions(self, grid: tuple[int, int]) -> Any:
        """The position table for a grid of patches, resampled where the config allows it."""
        cfg = self.cfg
        table = ops.cast(self.pos_embed, self.compute_dtype)
        if grid == cfg.grid_size:
            return table
        if not cfg.dynamic_img_size:
            size = tuple(g * cfg.patch_size for g in grid)
            raise ValueError(
                f"This model was built for images of {tuple(cfg.input_size)} pixels and got about "
                f"{size}. Create it with input_size={size}, or with dynamic_img_size=True."
            )
        return resample_position_table(table, cfg.grid_size, grid, cfg.num_prefix_positions)

    def _tokens(self, x: Any) -> Any:
        """Patch tokens with prefix tokens in front and positions added."""
        maps = self.patch_embed(x)
        grid = (maps.shape[1], maps.shape[2])
        if None in grid:
            raise ValueError(
                "ViT needs images of a known size; height and width of the input must not be None."
            )
        x = ops.reshape(maps, (-1, grid[0] * grid[1], self.cfg.embed_dim))
        positions = self._positions(grid)
        if self.cfg.no_embed_class:
            x = x + positions
        prefix = [
            ops.broadcast_to(
                ops.cast(t, x.dtype), (ops.shape(x)[0], t.shape[1], self.cfg.embed_dim)
            )
            for t in (self.cls_token, self.reg_token)
            if t is not None
        ]
        if prefix:
            x = ops.concatenate([*prefix, x], axis=1)
        return x if self.cfg.no_embed_class else x + positions

    def forward_features(
        self, x: Any, training: bool | None = None, return_features: bool = False
    ) -> Any:
        """Runs embedding, blocks and final normalisation; see the base class.

        Returns:
            All tokens, (batch, tokens, ``embed_dim``), prefix tokens first, and with
            ``return_features`` the dictionary of all features.

        Raises:
            ValueError: The images have another size than the model.
        """
        x = self.pos_drop(self._tokens(x), training=training)
        features = {"patch_embedding": x}
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        for i, block in enumerate(self.blocks):
            x = features[f"block_{i}"] = block(x, training=training)
        if self.norm is not None:
            x = self.norm(x)
        features["features_all"] = x
        return (x, features) if return_features else x

    def forward_head(self, x: Any, training: bool | None = None, pre_logits: bool = False) -> Any:
        """Pools and classifies tokens; see the base class."""
        if self.cfg.global_pool == "token":
            x = x[:, 0]
        elif self.cfg.global_pool == "avg":
            x = ops.mean(x[:, self.cfg.num_prefix_tokens :], axis=1)
        if self.fc_norm is not None:
            x = self.fc_norm(x)
        x = self.head_drop(x, training=training)
        return x if pre_logits or self.head is None else self.head(x)

    @classmethod
    def adapt_weight(
        cls, name: str, value: np.ndarray, shape: tuple[int, ...], cfg: Any, source_size: Any
    ) -> np.ndarray:
        """Resizes position table and patch kernel; see the base class."""
        if name == "patch_embed.proj.weight":
            if value.shape[:2] != shape[:2]:
                value = resample_patch_kernel(value, (shape[0], shape[1]))
        elif name == "pos_embed":
            rows = value.shape[1] - cfg.num_prefix_positions
            grid = _source_grid(rows, cfg.patch_size, source_size)
            if grid is not None and grid != cfg.grid_size:
                value = np.asarray(
                    resample_position_table(value, grid, cfg.grid_size, cfg.num_prefix_positions)
                )
        return value


def _source_grid(rows: int, patch_size: int, source_size: Any) -> tuple[int, int] | None:
    """Grid of a checkpoint's position table: from its image size if that fits, else square."""
    if source_size is not None:
        grid = (source_size[0] // patch_size, source_size[1] // patch_size)
        if grid[0] * grid[1] == rows:
            return grid
    side = round(max(rows, 0) ** 0.5)
    return (side, side) if side > 0 and side * side == rows else None
