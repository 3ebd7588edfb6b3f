"""What ConvNeXt and ViT have in common."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.config import ModelConfig


class ImageModel(keras.Model):
    """Base class of the zoo's architectures.

    A subclass builds its layers in ``__init__`` from ``cfg``, builds them in ``build`` and defines
    ``forward_features`` and ``forward_head``.
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
