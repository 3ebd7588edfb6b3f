"""Image to patch tokens."""

from __future__ import annotations

from typing import Any

import keras

from tfimm_lora.layers.norm import create_norm


@keras.saving.register_keras_serializable(package="tfimm_lora")
class PatchEmbed(keras.layers.Layer):
    """Embeds non-overlapping patches of an NHWC image (timm's ``PatchEmbed``).

    Args:
        patch_size: Side of a square patch in pixels.
        embed_dim: Width of a token.
        use_bias: Whether the projection has a bias. Defaults to ``True``.
        norm_layer: Kind of a normalisation behind the projection, ``""`` for none. Defaults to
            ``""``.
        norm_eps: Its epsilon. Defaults to 1e-6.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> maps = PatchEmbed(16, 192)(images)     # (b, 224, 224, 3) -> (b, 14, 14, 192)
    """

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        use_bias: bool = True,
        norm_layer: str = "",
        norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._config = {
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "use_bias": use_bias,
            "norm_layer": norm_layer,
            "norm_eps": norm_eps,
        }
        self.proj = keras.layers.Conv2D(
            embed_dim,
            patch_size,
            strides=patch_size,
            use_bias=use_bias,
            kernel_initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
            name="proj",
        )
        self.norm = create_norm(norm_layer, norm_eps, "norm") if norm_layer else None

    def build(self, input_shape: Any) -> None:
        self.proj.build(tuple(input_shape))
        if self.norm is not None:
            self.norm.build(self.proj.compute_output_shape(tuple(input_shape)))

    def call(self, inputs: Any) -> Any:
        x = self.proj(inputs)
        return x if self.norm is None else self.norm(x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.proj.compute_output_shape(tuple(input_shape))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
