"""Drawing what Keras' initialisers declare, with NumPy.

Backends draw slowly: TensorFlow takes most of the time of creating a model for it, and JAX compiles
a program for every shape. Here a truncated normal value is 16 random bits looked up in a table of
quantiles. The same seed gives the same values on every backend.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import keras
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from tfimm_lora.weights.aligned import empty_aligned

_CHUNK = 1 << 16
_LEVELS = 1 << 16
# The standard deviation of a normal distribution that is cut off at two of its own.
_TRUNCATED_STDDEV = 0.87962566103423978


@functools.cache
def _truncated_quantiles() -> np.ndarray:
    """Quantiles of the standard normal distribution cut off at -2 and 2, at equal distances."""
    x = np.linspace(-2, 2, 8193)
    cdf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    cdf = (cdf - cdf[0]) / (cdf[-1] - cdf[0])
    return np.interp((np.arange(_LEVELS) + 0.5) / _LEVELS, cdf, x)


def _truncated_normal(bits: Any, out: np.ndarray, mean: float, stddev: float) -> None:
    table = (_truncated_quantiles() * stddev + mean).astype(out.dtype)
    # Chunk by chunk, so that indices stay in the cache.
    for start in range(0, out.size, _CHUNK):
        chunk = out[start : start + _CHUNK]
        levels = bits.random_raw(-(-chunk.size // 4)).view(np.uint16)[: chunk.size]
        np.take(table, levels, out=chunk, mode="clip")


def _normal(bits: Any, out: np.ndarray, mean: float, stddev: float) -> None:
    np.random.Generator(bits).standard_normal(out=out, dtype=np.float32)
    out *= np.float32(stddev)
    out += np.float32(mean)


def _uniform(bits: Any, out: np.ndarray, low: float, high: float) -> None:
    np.random.Generator(bits).random(out=out, dtype=np.float32)
    out *= np.float32(high - low)
    out += np.float32(low)


def _fans(shape: tuple[int, ...]) -> tuple[float, float]:
    """Numbers of inputs and outputs of a kernel, as Keras counts them."""
    if len(shape) < 2:
        return (float(math.prod(shape)),) * 2
    field = math.prod(shape[:-2])
    return float(field * shape[-2]), float(field * shape[-1])


def _variance_scaling(initializer: Any, bits: Any, shape: Any, out: np.ndarray) -> None:
    fan_in, fan_out = _fans(shape)
    fan = {"fan_in": fan_in, "fan_out": fan_out}.get(initializer.mode, (fan_in + fan_out) / 2)
    variance = initializer.scale / max(1.0, fan)
    if initializer.distribution == "truncated_normal":
        _truncated_normal(bits, out, 0.0, math.sqrt(variance) / _TRUNCATED_STDDEV)
    elif initializer.distribution == "uniform":
        limit = math.sqrt(3.0 * variance)
        _uniform(bits, out, -limit, limit)
    else:
        _normal(bits, out, 0.0, math.sqrt(variance))


def _declares(initializer: Any, kind: type) -> bool:
    """Whether an initialiser is of a kind and draws as that kind does."""
    return isinstance(initializer, kind) and type(initializer).__call__ is kind.__call__


def draw(initializer: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """Draws the first value of a weight.

    Args:
        initializer: What the layer declares.
        shape: Shape of the weight.
        dtype: Type of the weight; values are drawn in float32 and rounded.

    Returns:
        The value, a function of the initialiser's seed; ``None`` if only the initialiser itself
        knows how to make it.

    Example:
        >>> kernel = draw(keras.initializers.TruncatedNormal(stddev=0.02), (384, 1536), "float32")
    """
    kinds = keras.initializers
    shape = tuple(int(side) for side in shape)
    for kind, constant in ((kinds.Zeros, 0.0), (kinds.Ones, 1.0)):
        if _declares(initializer, kind):
            return np.full(shape, constant, dtype)
    if _declares(initializer, kinds.Constant) and isinstance(initializer.value, (int, float)):
        return np.full(shape, initializer.value, dtype)
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int) or dtype not in ("float32", "float16", "bfloat16"):
        return None
    if getattr(initializer, "input_axes", None) is not None:
        return None
    bits, out = np.random.SFC64(seed & 0xFFFFFFFFFFFFFFFF), empty_aligned(shape)
    flat = out.reshape(-1)
    if _declares(initializer, kinds.TruncatedNormal):
        _truncated_normal(bits, flat, initializer.mean, initializer.stddev)
    elif _declares(initializer, kinds.RandomNormal):
        _normal(bits, flat, initializer.mean, initializer.stddev)
    elif _declares(initializer, kinds.RandomUniform):
        _uniform(bits, flat, initializer.minval, initializer.maxval)
    elif _declares(initializer, kinds.VarianceScaling):
        _variance_scaling(initializer, bits, shape, flat)
    else:
        return None
    return out.astype(dtype, copy=False)
