"""Initial values of the factor A; B starts at zero, so that step 0 is the base model."""

from __future__ import annotations

from collections.abc import Callable

import keras

INITIALIZATIONS: dict[str, Callable[[int], keras.Initializer]] = {
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PEFT's default.
    "kaiming_uniform": lambda rank: keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
    # A standard deviation of 1/r, as in PEFT.
    "gaussian": lambda rank: keras.initializers.RandomNormal(stddev=1 / rank),
}
"""Initialiser of A, by name, as function of the rank."""
