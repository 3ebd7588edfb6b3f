"""Using a kernel that is made of other tensors, without keeping it for the backward pass."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

_Apply = Callable[[Any, Any], Any]
_Read = Callable[[tuple[Any, ...]], Any]


_exporting: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "tfimm_lora_exporting", default=False
)


class ExportsKernels:
    """Mixin of models that are exported without what only the training's compilers need."""

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``export``; kernels are dequantised by operations that every runtime has."""
        token = _exporting.set(True)
        try:
            return super().export(*args, **kwargs)  # type: ignore[misc]
        finally:
            _exporting.reset(token)


def behind(tensors: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Tensors as they are, which a compiler cannot use before a value is there.

    What is made of variables alone is made first: all float kernels of a model would be in memory
    when its first layer runs. And a kernel that is made twice in the same way is made once and kept
    (XLA for CPUs removes the barriers that are meant to keep it from that). So the first tensor has
    something added that depends on the value and is zero, as no compiler knows.

    Args:
        tensors: What is stored.
        value: A tensor.
    """
    if _exporting.get():
        return tensors
    # Reshaping all of the value would make a copy of it where it is a transposed one.
    corner = ops.stop_gradient(value)[(slice(0, 1),) * len(value.shape)]
    some = ops.cast(ops.reshape(corner, (-1,)), "float32")
    zero = ops.logical_and(ops.isnan(some), ops.isinf(some))
    return (tensors[0] + ops.cast(zero, tensors[0].dtype), *tensors[1:])


def apply_recomputed(apply: _Apply, inputs: Any, tensors: tuple[Any, ...], read: _Read) -> Any:
    """``apply(inputs, read(tensors))``, whose gradient to the inputs calls ``read`` once more.

    Otherwise each layer's float kernel would stay in memory from the forward pass to the backward
    pass. There is no gradient to the tensors.

    Args:
        apply: Applies a kernel; linear in the inputs.
        inputs: The inputs.
        tensors: What is stored.
        read: Turns it into a kernel.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _jax(apply, inputs, tensors, read)
    if backend == "tensorflow":
        return _tensorflow(apply, inputs, tensors, read)
    return apply(inputs, read(behind(tensors, inputs)))


def _jax(apply: _Apply, inputs: Any, tensors: tuple[Any, ...], read: _Read) -> Any:
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def applied(x: Any, stored: tuple[Any, ...]) -> Any:
        return apply(x, read(behind(stored, x)))

    def forward(x: Any, stored: tuple[Any, ...]) -> tuple[Any, Any]:
        return applied(x, stored), stored

    def backward(stored: tuple[Any, ...], upstream: Any) -> tuple[Any, Any]:
        kernel = read(behind(stored, upstream))
        # Linear in x, so any x will do.
        x = jnp.zeros(inputs.shape, inputs.dtype)
        return jax.vjp(lambda x: apply(x, kernel), x)[1](upstream)[0], None

    applied.defvjp(forward, backward)
    return applied(inputs, tensors)


def _tensorflow(apply: _Apply, inputs: Any, tensors: tuple[Any, ...], read: _Read) -> Any:
    import tensorflow as tf

    @tf.custom_gradient
    def applied(x: Any) -> Any:
        def backward(upstream: Any, variables: Any = None) -> Any:
            kernel = read(behind(tensors, upstream))
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = apply(x, kernel)
            gradient = tape.gradient(y, x, upstream)
            # A float kernel that is frozen is a trainable variable to TensorFlow.
            return gradient if variables is None else (gradient, [None] * len(variables))

        return apply(x, read(behind(tensors, x))), backward

    return applied(inputs)
