"""What ConvNeXt and ViT have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.config import ModelConfig


class ImageModel(keras.Model):
    """Base class of the zoo's architectures.

    A subclass builds its layers in ``__init__`` from ``cfg``, builds them in ``build`` and defines
    ``forward_features`` and ``forward_head``; for feature maps also ``feature_info``,
    ``forward_intermediates`` and ``layers_behind``.
    """

    cfg_class: type = ModelConfig
    cfg: Any
    pretrained_cfg: Any

    @property
    def dummy_inputs(self) -> Any:
        """A batch of one black image of the configured size, (1, height, width, channels)."""
        return ops.zeros((1, *self.cfg.input_size, self.cfg.in_channels))

    @property
    def feature_names(self) -> list[str]:
        """Names of the features that a call with ``return_features=True`` returns."""
        raise NotImplementedError(f"{type(self).__name__} has to define feature_names.")

    def forward_features(
        self, x: Any, training: bool | None = None, return_features: bool = False
    ) -> Any:
        """Runs everything in front of pooling and head.

        Args:
            x: Images, (batch, height, width, channels), already normalised.
            training: Whether dropout and stochastic depth are active.
            return_features: Return a dictionary of intermediate features as well.

        Returns:
            The unpooled features, or a tuple of them and the dictionary.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward_features.")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Facts about the features that :meth:`forward_intermediates` can return.

        One dictionary for each, as in timm: ``num_chs``, its channels; ``reduction``, its stride
        in pixels; ``module``, the timm path of the layer behind which it is taken; ``index``.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define feature_info.")

    @property
    def default_out_indices(self) -> tuple[int, ...]:
        """Numbers of the features that an extractor returns if nothing else is wanted."""
        return tuple(range(len(self.feature_info)))

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
        """Runs everything in front of the head and returns intermediate feature maps.

        Args:
            x: Images, (batch, height, width, channels), already normalised.
            indices: An integer n for the last n features; a list of their numbers, negative ones
                counting from the end; ``None`` (the default) for all.
            norm: Apply the final normalisation to the maps it fits: every one of a ViT, the last
                one of a ConvNeXt that normalises in front of pooling. Defaults to ``False``.
            stop_early: Do not run what is behind the last wanted feature. Defaults to ``False``.
            intermediates_only: Return the maps alone. Defaults to ``False``.
            training: Whether dropout and stochastic depth are active.

        Returns:
            A tuple of the features of :meth:`forward_features` (with ``stop_early``, of the last
            layer that was run) and a list of maps, (batch, rows, columns, ``num_chs``), in the
            model's order; or the list alone.

        Raises:
            ValueError: A number is out of range or there twice.

        Example:
            >>> maps = model.forward_intermediates(images, [0, -1], intermediates_only=True)
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward_intermediates.")

    def layers_behind(self, index: int, norm: bool = False) -> list[keras.layers.Layer]:
        """Layers that a feature map does not depend on.

        Args:
            index: Number of the feature, from 0.
            norm: Whether the final normalisation is applied to it.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define layers_behind.")

    def forward_head(self, x: Any, training: bool | None = None, pre_logits: bool = False) -> Any:
        """Pools features and classifies them.

        Args:
            x: What :meth:`forward_features` returned.
            training: Whether dropout is active.
            pre_logits: Return the pooled features in front of the classifier instead of logits.

        Returns:
            Logits, (batch, classes), or pooled features, (batch, width).
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward_head.")

    def call(self, x: Any, training: bool | None = None, return_features: bool = False) -> Any:
        """Runs the whole model.

        Args:
            x: Images, (batch, height, width, channels), already normalised.
            training: Whether dropout and stochastic depth are active.
            return_features: Return a dictionary of intermediate features as well.

        Returns:
            Logits, (batch, classes); pooled features if the model has no head; or a tuple of them
            and the dictionary of features.
        """
        if not return_features:
            return self.forward_head(self.forward_features(x, training), training)
        x, features = self.forward_features(x, training, return_features=True)
        features["features"] = self.forward_head(x, pre_logits=True)
        features["logits"] = self.forward_head(x, training)
        return features["logits"], features

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (input_shape[0], self.cfg.nb_classes or self.num_features)

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        raise NotImplementedError(f"{type(self).__name__} has to define num_features.")

    @classmethod
    def adapt_weight(
        cls, name: str, value: np.ndarray, shape: tuple[int, ...], cfg: Any, source_size: Any
    ) -> np.ndarray:
        """Adapts a checkpoint's weight to another image or patch size.

        Args:
            name: timm name of the weight.
            value: The weight in Keras' layout.
            shape: The shape that the model needs.
            cfg: Configuration of the model.
            source_size: Height and width of the checkpoint's images, ``None`` if unknown.

        Returns:
            The adapted weight, or ``value`` itself where nothing is known to be done.
        """
        return value
