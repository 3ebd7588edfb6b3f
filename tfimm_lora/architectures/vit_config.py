"""What a vision transformer is built from."""

from __future__ import annotations

import dataclasses

from tfimm_lora.architectures.config import ModelConfig
from tfimm_lora.layers.pooling import POOLINGS

# Values that a field can have.
_CHOICES = {
    "global_pool": ("token", *POOLINGS, "map", ""),
    "pos_embed_interpolation": ("bicubic", "bilinear", "bilinear_align_corners"),
    "block_fn": (
        "Block",
        "ResPostBlock",
        "ParallelScalingBlock",
        "DiffParallelScalingBlock",
        "ParallelThingsBlock",
    ),
    "attn_layer": ("attn", "diff"),
    "mlp_layer": ("mlp", "glu", "swiglu"),
}


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
        scale_attn_norm: Normalise in front of the output projection of attention (BEiT-3).
        scale_mlp_norm: Normalise in front of the output layer of MLPs (BEiT-3).
        proj_bias: Bias of the other projections of a block.
        init_values: Initial layer scale, ``None`` for no layer scale.
        class_token: Whether there is a class token.
        no_embed_class: Position embeddings for patches only.
        distilled: Add a distillation token with a classifier of its own, ``head_dist``; logits are
            the mean of both (DeiT).
        reg_tokens: Number of register tokens.
        pre_norm: Normalise in front of the blocks (and no bias in the patch embedding).
        final_norm: Normalise behind the blocks.
        fc_norm: Normalise behind pooling instead; ``None`` does so for average pooling.
        pool_include_prefix: Pool the prefix tokens together with the patches.
        global_pool: ``token`` (the class token); ``avg``, ``max``, ``avgmax`` or ``map``
            (attention) over the patch tokens; or ``""`` for no pooling.
        dynamic_img_size: Accept images of any size by resampling the position table in each call.
        pos_embed_interpolation: How the position table and the patch kernel of a checkpoint are
            resized: ``bicubic`` (antialiased), ``bilinear`` or ``bilinear_align_corners``.
        act_layer: Activation of the MLPs.
        block_fn: ``Block``, ``ResPostBlock``, ``ParallelScalingBlock``,
            ``DiffParallelScalingBlock`` or ``ParallelThingsBlock``.
        attn_layer: ``attn``, or ``diff`` for differential attention.
        mlp_layer: ``mlp``, ``glu`` for gated MLPs with one input layer (the giant DINOv2) or
            ``swiglu`` for gated MLPs with two (AIMv2).
        embed_norm_layer: Normalisation of the patch embedding, ``""`` for none.
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
        ValueError: Sizes do not divide, a name is unknown, or fields contradict each other.

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
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    distilled: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    global_pool: str = "token"
    dynamic_img_size: bool = False
    pos_embed_interpolation: str = "bicubic"
    act_layer: str = "gelu"
    block_fn: str = "Block"
    attn_layer: str = "attn"
    mlp_layer: str = "mlp"
    embed_norm_layer: str = ""
    norm_layer: str = "layernorm"
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    first_conv: str = "patch_embed.proj"
    classifier: str | tuple[str, ...] = "head"

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
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(
                    f"{field} has to be one of {', '.join(map(repr, allowed))}, found {value!r}."
                )
        if self.distilled and self.classifier == "head":
            self.classifier = ("head", "head_dist")
        self._check_tokens()
        self._check_blocks()

    def _check_tokens(self) -> None:
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True. Use global_pool='avg'.")
        if self.distilled and (self.global_pool != "token" or self.reg_tokens):
            raise ValueError(
                "distilled=True needs global_pool='token' and no register tokens, found "
                f"global_pool={self.global_pool!r} and reg_tokens={self.reg_tokens}."
            )

    def _check_blocks(self) -> None:
        parallel = self.block_fn in ("ParallelScalingBlock", "DiffParallelScalingBlock")
        if parallel and (self.scale_attn_norm or self.scale_mlp_norm):
            raise ValueError(
                f"block_fn={self.block_fn!r} has neither scale_attn_norm nor scale_mlp_norm."
            )
        if parallel and (self.attn_layer, self.mlp_layer) != ("attn", "mlp"):
            raise ValueError(
                f"block_fn={self.block_fn!r} has attention and MLP of its own: leave attn_layer "
                f"and mlp_layer as they are, found {self.attn_layer!r} and {self.mlp_layer!r}."
            )
        differential = self.attn_layer == "diff" or self.block_fn == "DiffParallelScalingBlock"
        if differential and self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"Differential attention halves the heads: embed_dim={self.embed_dim} is not a "
                f"multiple of 2 * num_heads={2 * self.num_heads}."
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches along height and width."""
        return (self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens in front of the patches."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_prefix_positions(self) -> int:
        """Number of rows of the position table that belong to prefix tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def uses_fc_norm(self) -> bool:
        """Whether the last normalisation comes behind pooling."""
        pooled = self.global_pool in POOLINGS
        return self.final_norm and (pooled if self.fc_norm is None else self.fc_norm)
