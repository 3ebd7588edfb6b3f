"""How a model is made ready for training: what is new, what is frozen, what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tfimm_lora.data.registry import Registry
from tfimm_lora.training.config import RunConfig

if TYPE_CHECKING:
    import keras

METHODS: Registry[Callable[[RunConfig, int], keras.Model]] = Registry("training method")
"""Name to a function of the recipe and the number of outputs that gives a model to train."""


@METHODS.register("linear_probe")
def linear_probe(config: RunConfig, nb_outputs: int) -> keras.Model:
    """Returns the pretrained model with a trainable head; everything below is frozen.

    Args:
        config: The recipe.
        nb_outputs: Number of outputs of the head.

    Example:
        >>> model = linear_probe(RunConfig(model=ModelSection("vit_tiny_patch16_224")), 10)
    """
    from tfimm_lora.weights.adapt import is_below
    from tfimm_lora.weights.names import named_variables

    model = full(config, nb_outputs)
    for weight in named_variables(model):
        inside = is_below(weight.name, model.cfg.classifier)
        weight.variable.trainable = weight.variable.trainable and inside
    if not model.trainable_variables:
        raise ValueError(f"The model {config.model.name} has no classifier to probe with.")
    return model


@METHODS.register("lora")
def low_rank(config: RunConfig, nb_outputs: int) -> keras.Model:
    """Returns the pretrained model with low-rank updates and a head to train.

    Args:
        config: The recipe.
        nb_outputs: Number of outputs of the head.

    Example:
        >>> model = low_rank(RunConfig(model=ModelSection("vit_tiny_patch16_224")), 10)
    """
    from tfimm_lora import lora

    return lora.create_model(
        str(config.model.name),
        nb_classes=nb_outputs,
        **config.model.arguments(),
        **config.lora.arguments(),
    )


@METHODS.register("full")
def full(config: RunConfig, nb_outputs: int) -> keras.Model:
    """Returns the pretrained model with every weight trainable.

    Args:
        config: The recipe.
        nb_outputs: Number of outputs of the head.

    Example:
        >>> model = full(RunConfig(model=ModelSection("vit_tiny_patch16_224")), 10)
    """
    import tfimm_lora

    return tfimm_lora.create_model(
        str(config.model.name), nb_classes=nb_outputs, **config.model.arguments()
    )
