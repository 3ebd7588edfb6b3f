"""The optimizer: AdamW with a warm-up and a cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

NOT_DECAYED = ("bias", "gamma", "beta", "pos_embed", "cls_token", "reg_token")
"""Parts of the names of weights that no decay pulls to zero."""


def make_optimizer(
    learning_rate: float, steps: int, *, warmup: float = 0.1, weight_decay: float = 0.0
) -> keras.optimizers.Optimizer:
    """Returns AdamW whose rate rises linearly to its peak, then falls to 0 along a cosine.

    Args:
        learning_rate: The peak.
        steps: Number of all steps.
        warmup: Share of the steps in which the rate rises. Defaults to 0.1.
        weight_decay: Decay of matrices; biases, normalisations and tokens have none.

    Example:
        >>> make_optimizer(1e-3, steps=200).weight_decay
        0.0
    """
    import keras

    rising = round(warmup * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if rising else learning_rate,
        decay_steps=max(steps - rising, 1),
        warmup_target=learning_rate if rising else None,
        warmup_steps=rising,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    optimizer.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
    return optimizer
