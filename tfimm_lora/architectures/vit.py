"""Vision transformers: ViT, DeiT, DINOv2, CLIP's and SigLIP's towers and their like.

Papers: An Image is Worth 16x16 Words, arXiv:2010.11929; DeiT, arXiv:2012.12877; DINOv2,
arXiv:2304.07193; registers, arXiv:2309.16588; SigLIP, arXiv:2303.15343. Layer names and numerics
follow timm's ``vision_transformer.py`` and ``deit.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.base import ImageModel
from tfimm_lora.architectures.features import take_indices
from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.architectures.vit_blocks import BLOCKS
from tfimm_lora.architectures.vit_config import ViTConfig
from tfimm_lora.layers import AttentionPoolLatent, PatchEmbed, create_dropout, create_norm
from tfimm_lora.layers.pooling import pool
from tfimm_lora.layers.resample import resample_patch_kernel, resample_position_table


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
            cfg.patch_size,
            cfg.embed_dim,
            use_bias=not cfg.pre_norm,
            norm_layer=cfg.embed_norm_layer,
            norm_eps=cfg.norm_eps,
            name="patch_embed",
        )
        self.pos_drop = create_dropout(cfg.pos_drop_rate, name="pos_drop")

        def norm(name: str, wanted: bool) -> keras.layers.Layer | None:
            return create_norm(cfg.norm_layer, cfg.norm_eps, name) if wanted else None

        self.norm_pre = norm("norm_pre", cfg.pre_norm)
        rates = np.linspace(0.0, cfg.drop_path_rate, cfg.depth)
        self.blocks = [
            BLOCKS[cfg.block_fn](cfg, i, float(rate), name=f"blocks_{i}")
            for i, rate in enumerate(rates)
        ]
        self.norm = norm("norm", cfg.final_norm and not cfg.uses_fc_norm)
        self.attn_pool = None
        if cfg.global_pool == "map":
            self.attn_pool = AttentionPoolLatent(
                cfg.embed_dim,
                cfg.num_heads,
                mlp_ratio=cfg.mlp_ratio,
                act_layer=cfg.act_layer,
                norm_layer=cfg.norm_layer,
                norm_eps=cfg.norm_eps,
                name="attn_pool",
            )
        self.fc_norm = norm("fc_norm", cfg.uses_fc_norm)
        self.head_drop = create_dropout(cfg.drop_rate, name="head_drop")

        def head(name: str, wanted: bool) -> keras.layers.Layer | None:
            if not wanted:
                return None
            init = keras.initializers.TruncatedNormal(stddev=0.02)
            return keras.layers.Dense(cfg.nb_classes, kernel_initializer=init, name=name)

        self.head = head("head", cfg.nb_classes > 0)
        self.head_dist = head("head_dist", cfg.nb_classes > 0 and cfg.distilled)

    def build(self, input_shape: Any) -> None:
        cfg = self.cfg
        self.patch_embed.build((None, *cfg.input_size, cfg.in_channels))
        # Order of the prefix tokens is order of their rows in the position table.
        counts = {
            "cls_token": int(cfg.class_token),
            "dist_token": int(cfg.distilled),
            "reg_token": cfg.reg_tokens,
        }
        self.prefix_tokens = [
            self.add_weight(
                name=name,
                shape=(1, count, cfg.embed_dim),
                initializer=keras.initializers.RandomNormal(stddev=1e-6),
            )
            for name, count in counts.items()
            if count
        ]
        rows = cfg.num_prefix_positions + cfg.grid_size[0] * cfg.grid_size[1]
        self.pos_embed = self.add_weight(
            name="pos_embed",
            shape=(1, rows, cfg.embed_dim),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        )
        tokens = cfg.num_prefix_tokens + cfg.grid_size[0] * cfg.grid_size[1]
        shape = (None, tokens, cfg.embed_dim)
        for layer in (self.norm_pre, *self.blocks, self.norm, self.attn_pool):
            if layer is not None:
                layer.build(shape)
        pooled = (None, cfg.embed_dim) if cfg.global_pool else shape
        for layer in (self.fc_norm, self.head, self.head_dist):
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
            for t in self.prefix_tokens
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

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Facts about the patch tokens behind each block; see the base class."""
        width, stride = self.cfg.embed_dim, self.cfg.patch_size
        return [
            {"num_chs": width, "reduction": stride, "module": f"blocks.{i}", "index": i}
            for i in range(self.cfg.depth)
        ]

    @property
    def default_out_indices(self) -> tuple[int, ...]:
        """The last three blocks, as in timm."""
        return tuple(range(self.cfg.depth))[-3:]

    def forward_intermediates(
        self,
        x: Any,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Patch tokens behind blocks as maps; see :meth:`ImageModel.forward_intermediates`.

        With ``return_prefix_tokens`` the list has pairs of a map and the prefix tokens, (batch,
        ``num_prefix_tokens``, ``embed_dim``), if the model has such tokens.
        """
        cfg = self.cfg
        taken = take_indices(cfg.depth, indices)
        shape = (-1, x.shape[1] // cfg.patch_size, x.shape[2] // cfg.patch_size, cfg.embed_dim)
        x = self.pos_drop(self._tokens(x), training=training)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        outputs = []
        for i, block in enumerate(self.blocks[: taken[-1] + 1] if stop_early else self.blocks):
            x = block(x, training=training)
            if i in taken:
                outputs.append(self.norm(x) if norm and self.norm is not None else x)
        prefix = cfg.num_prefix_tokens
        found = [ops.reshape(y[:, prefix:], shape) for y in outputs]
        if return_prefix_tokens and prefix:
            found = [(y, tokens[:, :prefix]) for y, tokens in zip(found, outputs, strict=True)]
        if intermediates_only:
            return found
        return (x if self.norm is None else self.norm(x)), found

    def layers_behind(self, index: int, norm: bool = False) -> list[keras.layers.Layer]:
        """Later blocks, pooling, head, unused normalisations; see the base class."""
        behind = [self.attn_pool, self.fc_norm, self.head, self.head_dist]
        behind += [*self.blocks[index + 1 :], None if norm else self.norm]
        return [layer for layer in behind if layer is not None]

    def forward_head(self, x: Any, training: bool | None = None, pre_logits: bool = False) -> Any:
        """Pools and classifies tokens; see the base class."""
        if self.cfg.distilled:
            x, distilled = (self.head_drop(x[:, i], training=training) for i in range(2))
            if not pre_logits and self.head is not None:
                x, distilled = self.head(x), self.head_dist(distilled)
            return (x + distilled) / 2
        x = self._pool(x, training)
        if self.fc_norm is not None:
            x = self.fc_norm(x)
        x = self.head_drop(x, training=training)
        return x if pre_logits or self.head is None else self.head(x)

    def _pool(self, x: Any, training: bool | None) -> Any:
        kind = self.cfg.global_pool
        if kind == "token":
            return x[:, 0]
        if kind and not self.cfg.pool_include_prefix:
            x = x[:, self.cfg.num_prefix_tokens :]
        return self.attn_pool(x, training=training) if kind == "map" else pool(x, kind, axis=1)

    @classmethod
    def adapt_weight(
        cls, name: str, value: np.ndarray, shape: tuple[int, ...], cfg: Any, source_size: Any
    ) -> np.ndarray:
        """Resizes position table and patch kernel; see the base class."""
        if name == "patch_embed.proj.weight":
            if value.shape[:2] != shape[:2]:
                value = resample_patch_kernel(
                    value, (shape[0], shape[1]), cfg.pos_embed_interpolation
                )
        elif name == "pos_embed":
            rows = value.shape[1] - cfg.num_prefix_positions
            grid = _source_grid(rows, cfg.patch_size, source_size)
            if grid is not None and grid != cfg.grid_size:
                value = resample_position_table(
                    value,
                    grid,
                    cfg.grid_size,
                    cfg.num_prefix_positions,
                    cfg.pos_embed_interpolation,
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
