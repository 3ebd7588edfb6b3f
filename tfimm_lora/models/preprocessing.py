"""From pixel values to normalised model inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tfimm_lora.models.normalization import normalize, per_channel
from tfimm_lora.models.registry import model_config, pretrained_config


def create_preprocessing(
    model_name: Any, *, in_channels: int | None = None, dtype: str | None = None
) -> Callable[[Any], Any]:
    """Creates the function that normalises images for a model.

    Args:
        model_name: A registered name, with or without tag; or a model of the zoo, for the
            checkpoint that it was created from.
        in_channels: Number of channels of the images; ``None`` takes the model's. Mean and
            standard deviation are repeated in turn where there are more than three, and cut where
            there are fewer.
        dtype: Type of the result; ``None`` is Keras' float type.

    Returns:
        A function from values in [0, 255], of any type and shape (..., channels), to normalised
        values. Inside ``tf.data`` and on tensors it returns tensors.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> images = create_preprocessing("convnext_tiny")(images)
    """
    if isinstance(model_name, str):
        facts, cfg = pretrained_config(model_name), model_config(model_name)
    else:
        facts, cfg = model_name.pretrained_cfg, model_name.cfg
    channels = in_channels or cfg.in_channels
    dtype = dtype or keras.config.floatx()
    mean, std = per_channel(facts.mean, channels), per_channel(facts.std, channels)

    def preprocess(images: Any) -> Any:
        if type(images).__module__.partition(".")[0] == "tensorflow":
            # tf.data maps over TensorFlow tensors whatever the backend.
            import tensorflow as tf

            return tf.cast(normalize(tf.cast(images, "float32"), mean, std), dtype)
        x = ops.cast(ops.convert_to_tensor(images), "float32")
        return ops.cast(normalize(x, mean, std), dtype)

    return preprocess
