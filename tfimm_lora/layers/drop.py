"""Dropout and stochastic depth whose random state is saved with the model.

Keras keeps the state of a layer's seed generator out of its files, so a reloaded model would
draw other masks than the run that never stopped. These layers write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

_SEED_KEY = "seed_state"


def save_seed_state(store: Any, generator: keras.random.SeedGenerator | None) -> None:
    """Writes the state of a seed generator into a layer's weight store."""
    if generator is not None:
        store[_SEED_KEY] = ops.convert_to_numpy(ops.convert_to_tensor(generator.state))


def load_seed_state(store: Any, generator: keras.random.SeedGenerator | None) -> None:
    """Restores what :func:`save_seed_state` wrote; older files without it are accepted."""
    if generator is not None and _SEED_KEY in list(store.keys()):
        generator.state.assign(np.asarray(store[_SEED_KEY]))


@keras.saving.register_keras_serializable(package="tfimm_lora")
class Dropout(keras.layers.Dropout):
    """``keras.layers.Dropout`` whose random state survives saving.

    Args:
        rate: Fraction of the inputs that is set to zero during training.
        **kwargs: Passed on to ``keras.layers.Dropout``.

    Example:
        >>> y = Dropout(0.1)(x, training=True)
    """

    def save_own_variables(self, store: Any) -> None:
        save_seed_state(store, getattr(self, "seed_generator", None))

    def load_own_variables(self, store: Any) -> None:
        load_seed_state(store, getattr(self, "seed_generator", None))


@keras.saving.register_keras_serializable(package="tfimm_lora")
class DropPath(keras.layers.Layer):
    """Stochastic depth: drops whole examples of a residual branch during training.

    Paper: Deep Networks with Stochastic Depth, arXiv:1603.09382 (timm's ``DropPath``).

    Args:
        rate: Probability with which the branch of an example is dropped, in [0, 1). What is
            kept is divided by ``1 - rate``. Defaults to 0.0.
        **kwargs: Passed on to ``keras.layers.Layer``.

    Example:
        >>> y = shortcut + DropPath(0.1)(branch, training=True)
    """

    def __init__(self, rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate has to be in [0, 1), found {rate}.")
        self.rate = float(rate)
        self.seed_generator = keras.random.SeedGenerator() if rate > 0 else None
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not training or self.rate == 0.0:
            return inputs
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        keep = 1.0 - self.rate
        draw = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        mask = ops.cast(ops.floor(draw + keep) / keep, inputs.dtype)
        return inputs * mask

    def save_own_variables(self, store: Any) -> None:
        save_seed_state(store, self.seed_generator)

    def load_own_variables(self, store: Any) -> None:
        load_seed_state(store, self.seed_generator)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


def _unchanged(inputs: Any, training: bool | None = None) -> Any:
    return inputs


def create_dropout(rate: float, name: str) -> Callable[..., Any]:
    """Creates a dropout layer, or for rate 0 a function that returns its input.

    A third of a model's layers would else be created and called to do nothing.

    Args:
        rate: See :class:`Dropout`.
        name: The layer's name.

    Example:
        >>> drop = create_dropout(0.0, name="drop")
    """
    return Dropout(rate, name=name) if rate else _unchanged


def create_drop_path(rate: float, name: str) -> Callable[..., Any]:
    """Creates a layer of stochastic depth, or for rate 0 a function that returns its input.

    Args:
        rate: See :class:`DropPath`.
        name: The layer's name.

    Example:
        >>> drop_path = create_drop_path(0.1, name="drop_path")
    """
    return DropPath(rate, name=name) if rate else _unchanged
