"""ConvNeXt and ConvNeXt V2.

Papers: A ConvNet for the 2020s, arXiv:2201.03545, and ConvNeXt V2, arXiv:2301.00808. Layer names
and numerics follow timm's ``convnext.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.base import ImageModel
from tfimm_lora.architectures.config import ModelConfig
from tfimm_lora.architectures.features import take_indices
from tfimm_lora.architectures.serialization import keras_serializable
from tfimm_lora.layers import Mlp, create_drop_path, create_dropout, create_norm, get_activation
from tfimm_lora.layers.pooling import POOLINGS, pool

# Stem layers in timm's order: (kind, width relative to dims[0], kernel, stride). timm numbers the
# activation too, which is why names are positions.
_STEMS: dict[str, list[tuple[str, float, int, int]]] = {
    "patch": [("conv", 1, 0, 0), ("norm", 0, 0, 0)],
    "overlap": [("conv", 1, 3, 2), ("conv", 1, 3, 2), ("norm", 0, 0, 0)],
    "overlap_tiered": [("conv", 0.5, 3, 2), ("conv", 1, 3, 2), ("norm", 0, 0, 0)],
    "overlap_act": [("conv", 1, 3, 2), ("act", 0, 0, 0), ("conv", 1, 3, 2), ("norm", 0, 0, 0)],
}


@dataclasses.dataclass
class ConvNeXtConfig(ModelConfig):
    """Configuration of :class:`ConvNeXt`; fields beyond the base class carry timm's names.

    Attributes:
        depths: Number of blocks of each stage.
        dims: Number of channels of each stage.
        kernel_sizes: Side of the depthwise kernels, one number or one per stage.
        patch_size: Kernel and stride of the ``patch`` stem.
        stem_type: ``patch``, ``overlap``, ``overlap_tiered`` or ``overlap_act``.
        mlp_ratio: Hidden width of a block's MLP over its width.
        conv_mlp: MLPs of 1x1 convolutions instead of dense layers (shapes in a checkpoint).
        use_grn: Global response normalisation in the MLPs (V2).
        ls_init_value: Initial layer scale, ``None`` for none.
        act_layer: Activation of the MLPs.
        norm_layer: ``layernorm``, ``rmsnorm`` or ``simplenorm``.
        norm_eps: Epsilon of all normalisations.
        head_norm_first: Normalise in front of pooling instead of behind it.
        head_hidden_size: Width of a hidden layer in the head, ``None`` for none.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""`` to classify every position.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier blocks have less.
        first_conv: See the base class.
        classifier: See the base class.

    Raises:
        ValueError: ``depths`` and ``dims`` differ in length, or a name is unknown.

    Example:
        >>> cfg = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), nb_classes=10)
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_sizes: int | tuple[int, ...] = 7
    patch_size: int = 4
    stem_type: str = "patch"
    mlp_ratio: float = 4.0
    conv_mlp: bool = False
    use_grn: bool = False
    ls_init_value: float | None = 1e-6
    act_layer: str = "gelu"
    norm_layer: str = "layernorm"
    norm_eps: float = 1e-6
    head_norm_first: bool = False
    head_hidden_size: int | None = None
    global_pool: str = "avg"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    first_conv: str = "stem.0"
    classifier: str = "head.fc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.dims):
            raise ValueError(f"depths={self.depths} and dims={self.dims} differ in length.")
        if not isinstance(self.kernel_sizes, int) and len(self.kernel_sizes) != len(self.dims):
            raise ValueError(
                f"kernel_sizes={self.kernel_sizes} needs one entry per stage ({len(self.dims)})."
            )
        if self.stem_type not in _STEMS:
            raise ValueError(
                f"Unknown stem_type {self.stem_type!r}. Use one of {', '.join(_STEMS)}."
            )
        if self.global_pool not in (*POOLINGS, ""):
            raise ValueError(
                f"global_pool has to be one of {', '.join(map(repr, POOLINGS))} or '', found "
                f"{self.global_pool!r}."
            )


def _conv(filters: int, kernel_size: int, stride: int, name: str) -> keras.layers.Layer:
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=stride,
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        name=name,
    )


def _multiple_of_8(width: int) -> int:
    """Nearest multiple of 8, at least 8, not below 90% of ``width`` (timm's ``make_divisible``)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _pad(x: Any, kernel_size: int) -> Any:
    """Pads height and width on both sides, as torch does; Keras' ``same`` pads unevenly."""
    p = kernel_size // 2
    return ops.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))


class ConvNeXtBlock(keras.layers.Layer):
    """Depthwise convolution, normalisation, MLP, layer scale (timm's ``ConvNeXtBlock``)."""

    def __init__(self, cfg: ConvNeXtConfig, stage: int, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = cfg.dims[stage]
        kernel = cfg.kernel_sizes if isinstance(cfg.kernel_sizes, int) else cfg.kernel_sizes[stage]
        self.ls_init_value = cfg.ls_init_value
        self.conv_dw = keras.layers.DepthwiseConv2D(
            kernel,
            padding="same",
            depthwise_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            name="conv_dw",
        )
        self.norm = create_norm(cfg.norm_layer, cfg.norm_eps, "norm")
        self.mlp = Mlp(
            int(cfg.mlp_ratio * self.dim),
            self.dim,
            act_layer=cfg.act_layer,
            use_conv=cfg.conv_mlp,
            use_grn=cfg.use_grn,
            name="mlp",
        )
        self.drop_path = create_drop_path(drop_path, name="drop_path")

    def build(self, input_shape: Any) -> None:
        input_shape = tuple(input_shape)
        self.conv_dw.build(input_shape)
        self.norm.build(input_shape)
        self.mlp.build(input_shape)
        self.gamma = None
        if self.ls_init_value is not None:
            init = keras.initializers.Constant(self.ls_init_value)
            self.gamma = self.add_weight(name="gamma", shape=(self.dim,), initializer=init)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.mlp(self.norm(self.conv_dw(inputs)), training=training)
        if self.gamma is not None:
            x = x * ops.cast(self.gamma, x.dtype)
        return inputs + self.drop_path(x, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class ConvNeXtStage(keras.layers.Layer):
    """Optional downsampling followed by blocks (timm's ``ConvNeXtStage``)."""

    def __init__(
        self, cfg: ConvNeXtConfig, stage: int, drop_paths: list[float], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.dim = cfg.dims[stage]
        self.downsample_0 = self.downsample_1 = None
        # A stem with stride 2 leaves the other half of timm's reduction by 4 to the first stage.
        if stage > 0 or (cfg.stem_type == "patch" and cfg.patch_size == 2):
            self.downsample_0 = create_norm(cfg.norm_layer, cfg.norm_eps, "downsample_0")
            self.downsample_1 = _conv(self.dim, 2, 2, "downsample_1")
        self.blocks = [
            ConvNeXtBlock(cfg, stage, rate, name=f"blocks_{i}") for i, rate in enumerate(drop_paths)
        ]

    def build(self, input_shape: Any) -> None:
        shape = tuple(input_shape)
        if self.downsample_1 is not None:
            self.downsample_0.build(shape)
            self.downsample_1.build(shape)
            shape = (shape[0], None, None, self.dim)
        for block in self.blocks:
            block.build(shape)

    def call(self, inputs: Any, training: bool | None = None, return_features: bool = False) -> Any:
        x, features = inputs, {}
        if self.downsample_1 is not None:
            x = features["downsample"] = self.downsample_1(self.downsample_0(x))
        for i, block in enumerate(self.blocks):
            x = features[f"block_{i}"] = block(x, training=training)
        return (x, features) if return_features else x


class ConvNeXtHead(keras.layers.Layer):
    """Pooling, norm, optional hidden layer, classifier (timm's ``NormMlpClassifierHead``)."""

    def __init__(self, cfg: ConvNeXtConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        init = keras.initializers.TruncatedNormal(stddev=0.02)
        self.pool = cfg.global_pool
        self.dim = cfg.dims[-1]
        self.norm = (
            None if cfg.head_norm_first else create_norm(cfg.norm_layer, cfg.norm_eps, "norm")
        )
        self.pre_logits = None
        if cfg.head_hidden_size:
            self.pre_logits = _PreLogits(cfg.head_hidden_size, name="pre_logits")
        self.drop = create_dropout(cfg.drop_rate, name="drop")
        self.fc = None
        if cfg.nb_classes:
            self.fc = keras.layers.Dense(cfg.nb_classes, kernel_initializer=init, name="fc")

    def build(self, input_shape: Any) -> None:
        shape = (None, self.dim) if self.pool else tuple(input_shape)
        if self.norm is not None:
            self.norm.build(shape)
        if self.pre_logits is not None:
            self.pre_logits.build(shape)
            shape = shape[:-1] + (self.pre_logits.width,)
        if self.fc is not None:
            self.fc.build(shape)

    def call(self, inputs: Any, training: bool | None = None, pre_logits: bool = False) -> Any:
        x = pool(inputs, self.pool, axis=(1, 2))
        if self.norm is not None:
            x = self.norm(x)
        if self.pre_logits is not None:
            x = self.pre_logits(x)
        x = self.drop(x, training=training)
        return x if pre_logits or self.fc is None else self.fc(x)


class _PreLogits(keras.layers.Layer):
    """``fc`` and erf GELU; a layer of its own so that its weights carry timm's path."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        init = keras.initializers.TruncatedNormal(stddev=0.02)
        self.fc = keras.layers.Dense(width, kernel_initializer=init, name="fc")

    def build(self, input_shape: Any) -> None:
        self.fc.build(tuple(input_shape))

    def call(self, inputs: Any) -> Any:
        return get_activation("gelu")(self.fc(inputs))


@keras_serializable
class ConvNeXt(ImageModel):
    """A ConvNeXt.

    Args:
        cfg: The configuration.
        **kwargs: Passed on to ``keras.Model`` (``name``, ``dtype``).

    Example:
        >>> model = tfimm_lora.create_model("convnext_tiny")
        >>> logits = model(model.dummy_inputs)     # (1, 1000)
    """

    cfg_class = ConvNeXtConfig

    def __init__(self, cfg: ConvNeXtConfig, **kwargs: Any) -> None:
        super().__init__(**{"name": "convnext", **kwargs})
        self.cfg = cfg
        self._stem_spec = _STEMS[cfg.stem_type]
        self.stem = []
        for i, (kind, width, kernel, stride) in enumerate(self._stem_spec):
            if kind == "conv":
                self.stem.append(
                    _conv(
                        cfg.dims[0] if width == 1 else _multiple_of_8(int(cfg.dims[0] * width)),
                        kernel or cfg.patch_size,
                        stride or cfg.patch_size,
                        f"stem_{i}",
                    )
                )
            elif kind == "norm":
                self.stem.append(create_norm(cfg.norm_layer, cfg.norm_eps, f"stem_{i}"))
            else:
                act = get_activation(cfg.act_layer)
                self.stem.append(keras.layers.Activation(act, name=f"stem_{i}"))
        rates = np.split(
            np.linspace(0.0, cfg.drop_path_rate, sum(cfg.depths)), np.cumsum(cfg.depths)[:-1]
        )
        self.stages = [
            ConvNeXtStage(cfg, i, [float(r) for r in rates[i]], name=f"stages_{i}")
            for i in range(len(cfg.depths))
        ]
        self.norm_pre = (
            create_norm(cfg.norm_layer, cfg.norm_eps, "norm_pre") if cfg.head_norm_first else None
        )
        self.head = ConvNeXtHead(cfg, name="head")

    def build(self, input_shape: Any) -> None:
        shape: tuple[int | None, ...] = (None, None, None, self.cfg.in_channels)
        for (kind, *_), layer in zip(self._stem_spec, self.stem, strict=True):
            layer.build(shape)
            if kind == "conv":
                shape = shape[:-1] + (layer.filters,)
        for stage in self.stages:
            stage.build(shape)
            shape = shape[:-1] + (stage.dim,)
        if self.norm_pre is not None:
            self.norm_pre.build(shape)
        self.head.build(shape)

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return self.cfg.head_hidden_size or self.cfg.dims[-1]

    @property
    def feature_names(self) -> list[str]:
        """Names of the features that a call with ``return_features=True`` returns."""
        names = ["stem"]
        for j, stage in enumerate(self.stages):
            names += [f"stage_{j}/downsample"] if stage.downsample_1 is not None else []
            names += [f"stage_{j}/block_{i}" for i in range(len(stage.blocks))]
        return [*names, "conv_features", "features", "logits"]

    def _run_stem(self, x: Any) -> Any:
        for (kind, _, kernel, _), layer in zip(self._stem_spec, self.stem, strict=True):
            x = layer(_pad(x, kernel) if kind == "conv" and kernel else x)
        return x

    def forward_features(
        self, x: Any, training: bool | None = None, return_features: bool = False
    ) -> Any:
        """Runs stem and stages; see :meth:`ImageModel.forward_features`.

        Returns:
            Feature maps, (batch, height / 32, width / 32, ``dims[-1]``), and with
            ``return_features`` the dictionary of all maps.
        """
        x = self._run_stem(x)
        features = {"stem": x}
        for j, stage in enumerate(self.stages):
            x, maps = stage(x, training=training, return_features=True)
            features.update({f"stage_{j}/{key}": value for key, value in maps.items()})
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        features["conv_features"] = x
        return (x, features) if return_features else x

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Facts about the output of each stage; see the base class."""
        first = self.cfg.patch_size if self.cfg.stem_type == "patch" else 4
        first = 4 if first == 2 else first  # the first stage then downsamples
        return [
            {"num_chs": dim, "reduction": first * 2**i, "module": f"stages.{i}", "index": i}
            for i, dim in enumerate(self.cfg.dims)
        ]

    def forward_intermediates(
        self,
        x: Any,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        intermediates_only: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Outputs of stages; see :meth:`ImageModel.forward_intermediates`."""
        taken = take_indices(len(self.stages), indices)
        x, maps = self._run_stem(x), []
        for i, stage in enumerate(self.stages[: taken[-1] + 1] if stop_early else self.stages):
            y = x = stage(x, training=training)
            # The normalisation has the channels of the last stage.
            if self.norm_pre is not None and i == len(self.stages) - 1:
                x = self.norm_pre(x)
            if i in taken:
                maps.append(x if norm else y)
        return maps if intermediates_only else (x, maps)

    def layers_behind(self, index: int, norm: bool = False) -> list[keras.layers.Layer]:
        """Later stages, the last normalisation if it is not used, head; see the base class."""
        used = self.norm_pre is None or (norm and index == len(self.stages) - 1)
        return [*self.stages[index + 1 :], *([] if used else [self.norm_pre]), self.head]

    def forward_head(self, x: Any, training: bool | None = None, pre_logits: bool = False) -> Any:
        """Pools and classifies feature maps; see :meth:`ImageModel.forward_head`."""
        return self.head(x, training=training, pre_logits=pre_logits)
