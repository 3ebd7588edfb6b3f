"""Keras serialisation of models that are configured by a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import keras

from tfimm_lora.architectures.config import config_to_dict
from tfimm_lora.architectures.pretrained import PretrainedConfig

_Model = TypeVar("_Model", bound=type)


@contextlib.contextmanager
def _policy_of_sublayers(dtype: Any) -> Iterator[None]:
    """A model's precision is that of the layers that its constructor makes."""
    if dtype is None:
        yield
        return
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(keras.dtype_policies.get(dtype))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def keras_serializable(cls: _Model) -> _Model:
    """Class decorator that lets Keras save and restore a model with a config dataclass.

    The class names its dataclass in ``cfg_class`` and takes ``cfg`` as first constructor
    argument. The decorator registers it with Keras, stores ``cfg`` and ``pretrained_cfg`` in the
    Keras config and accepts them as dictionaries when the model is restored. ``dtype`` given to the
    constructor holds for the layers that it makes, too. tfimm has a decorator of the same name and
    use.

    Args:
        cls: A ``keras.Model`` subclass.

    Returns:
        The same class, with ``get_config`` and ``from_config``.

    Raises:
        ValueError: ``cls`` has no ``cfg_class``.

    Example:
        >>> @keras_serializable
        ... class MyModel(keras.Model):
        ...     cfg_class = MyConfig
    """
    if not dataclasses.is_dataclass(getattr(cls, "cfg_class", None)):
        raise ValueError(
            f"{cls.__name__} needs a class attribute cfg_class that names its config dataclass."
        )
    initializer = cls.__init__

    @functools.wraps(initializer)
    def wrapped_init(self: Any, cfg: Any = None, *args: Any, **kwargs: Any) -> None:
        cfg_class = type(self).cfg_class
        if isinstance(cfg, dict):
            cfg = cfg_class(**cfg)
        if not isinstance(cfg, cls.cfg_class):
            raise ValueError(
                f"{type(self).__name__} takes a {cfg_class.__name__} (or a dict of its fields) "
                f"as cfg, found {type(cfg).__name__}."
            )
        pretrained_cfg = kwargs.pop("pretrained_cfg", None)
        if isinstance(pretrained_cfg, dict):
            pretrained_cfg = PretrainedConfig(**pretrained_cfg)
        with _policy_of_sublayers(kwargs.get("dtype")):
            initializer(self, cfg, *args, **kwargs)
        self.cfg = cfg
        if pretrained_cfg is not None or not hasattr(self, "pretrained_cfg"):
            self.pretrained_cfg = pretrained_cfg

    def get_config(self: Any) -> dict[str, Any]:
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "cfg": config_to_dict(self.cfg),
        }
        if self.pretrained_cfg is not None:
            config["pretrained_cfg"] = config_to_dict(self.pretrained_cfg)
        # A LoRA model may have more adapters than its config names.
        further = getattr(self, "_further_config", dict)
        return {**config, **further()}

    def from_config(klass: Any, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        return klass(config.pop("cfg"), **config)

    cls.__init__ = wrapped_init
    cls.get_config = get_config
    cls.from_config = classmethod(from_config)
    return keras.saving.register_keras_serializable(package="tfimm_lora")(cls)
