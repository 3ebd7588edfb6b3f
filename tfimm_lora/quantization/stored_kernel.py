"""A packed kernel in the place of the variable that it stands for."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.quantization.format import PackedFormat
from tfimm_lora.quantization.kernel_matrix import from_matrix, matrix_shape, to_matrix
from tfimm_lora.quantization.recompute import behind
from tfimm_lora.weights.names import timm_path, variable_value

_behind: contextvars.ContextVar[Any] = contextvars.ContextVar("tfimm_lora_behind", default=None)


class StoredKernel:
    """What ``layer.kernel`` is in a layer whose kernel is packed.

    It has the shape and the name of the float kernel, can be read (as a tensor) and assigned to,
    but not trained. Reading it in a compiled function dequantises there.

    Attributes:
        layer: The layer.
        format: The format.
        group_size: Rows of a group.
        shape: Shape of the float kernel.
        variables: The variables that hold it, by the names of the format's tensors.
    """

    name = "kernel"
    dtype = "float32"

    def __init__(
        self,
        layer: Any,
        format: PackedFormat,
        group_size: int,
        shape: tuple[int, ...],
        initializer: Any,
    ) -> None:
        self.layer = layer
        self.format = format
        self.group_size = group_size
        self.shape = tuple(shape)
        fresh = _Once(lambda: np.asarray(ops.convert_to_numpy(initializer(shape, "float32"))), self)
        tensors = format.tensors(*self.sides, group_size)
        self._names = tuple(tensors)
        self.variables = {
            name: layer.add_weight(
                name=f"kernel_{name}",
                shape=tensor_shape,
                dtype=dtype,
                initializer=_Part(fresh, name),
                trainable=False,
                autocast=False,
            )
            for name, (tensor_shape, dtype) in tensors.items()
        }

    @property
    def path(self) -> str:
        """Path of the float kernel in the model."""
        return f"{self.layer.path}/kernel"

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and outputs of the kernel's matrix."""
        return matrix_shape(self.layer, self.shape)

    @property
    def trainable(self) -> bool:
        """Always ``False``."""
        return False

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if value:
            # The path in the model, where there is one: the layer's name may not be the only one.
            module = timm_path(self.layer.path.partition("/")[2] or self.layer.name)
            raise ValueError(
                f"{self.path} is stored as {self.format.name}, so it has no gradient and cannot be "
                "trained. Train an adapter, or store it in float: lora.quantize(model, "
                f"{{{module!r}: None}}), lora_quantization={{{module!r}: None, ...}}, or in a fake "
                "format such as 'fake-int8'."
            )

    def quantize(self, value: Any) -> dict[str, np.ndarray]:
        """Turns a float kernel into what is stored, and checks it.

        Args:
            value: An array, tensor or variable; or a packed kernel of the same format.

        Raises:
            ValueError: The kernel has another shape or is not finite.
        """
        if self.same_storage(value):
            return {name: variable_value(v) for name, v in value.variables.items()} | {
                name: self.format.neutral(name, tuple(v.shape))
                for name, v in self.variables.items()
                if name not in value.variables
            }
        if not isinstance(value, np.ndarray):
            value = variable_value(value)
        value = np.asarray(value, np.float32)
        if value.shape != self.shape:
            raise ValueError(f"{self.path} has shape {self.shape} and its value {value.shape}.")
        check_finite(self.path, value)
        return self._stored(self.layer.kernel_to_quantize(value, self.round_trip))

    def _stored(self, value: np.ndarray) -> dict[str, np.ndarray]:
        matrix = np.asarray(ops.convert_to_numpy(to_matrix(self.layer, value)))
        if self.layer.kernel_rounding is not None:
            return self.layer.kernel_rounding(self.format, matrix, self.group_size)
        return self.format.quantize(matrix, self.group_size)

    def round_trip(self, value: np.ndarray) -> np.ndarray:
        """A float kernel as it is after quantising and dequantising."""
        stored = tuple(ops.convert_to_tensor(tensor) for tensor in self._stored(value).values())
        return np.asarray(ops.convert_to_numpy(self.dequantize(stored)))

    def assign(self, value: Any) -> None:
        """Quantises and stores a kernel, see :meth:`quantize`."""
        for name, tensor in self.quantize(value).items():
            self.variables[name].assign(tensor)

    def readers(self, read: Callable[[], Any]) -> list[tuple[Any, Callable[[], np.ndarray]]]:
        """The variables, each with a function that returns its value; the kernel is read once."""
        once = _Once(read, self)
        return [(v, functools.partial(once.take, name)) for name, v in self.variables.items()]

    def same_storage(self, other: Any) -> bool:
        """Whether another kernel is stored in such a way that its codes can be copied."""
        return (
            isinstance(other, StoredKernel)
            and self.format.reads(other.format)
            and (other.group_size, other.shape) == (self.group_size, self.shape)
        )

    def tensors(self) -> tuple[Any, ...]:
        """What is stored, as tensors, in the format's order."""
        return tuple(ops.convert_to_tensor(v) for v in self.variables.values())

    def dequantize(self, tensors: tuple[Any, ...], dtype: Any = "float32") -> Any:
        """The float kernel that tensors of :meth:`tensors` stand for."""
        named = dict(zip(self._names, tensors, strict=True))
        matrix = self.format.dequantize(named, self.sides, self.group_size)
        return from_matrix(self.layer, ops.cast(matrix, dtype), self.shape)

    def numpy(self) -> np.ndarray:
        """The dequantised kernel as an array."""
        return np.array(ops.convert_to_numpy(self.dequantize(self.tensors())))

    @contextlib.contextmanager
    def read_behind(self, value: Any) -> Iterator[None]:
        """Where the kernel is read inside, this is not done before a value is there.

        Args:
            value: A tensor, or ``None``.
        """
        token = _behind.set(value)
        try:
            yield
        finally:
            _behind.reset(token)

    def _tensor(self) -> Any:
        tensors, value = self.tensors(), _behind.get()
        return self.dequantize(
            tensors if value is None else behind(tensors, value), _autocast_dtype()
        )

    # Backends convert the kernel to a tensor by these, where Keras' layers use it.
    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        return self._tensor() if dtype is None else ops.cast(self._tensor(), dtype)

    def __jax_array__(self) -> Any:
        return self._tensor()

    def __repr__(self) -> str:
        return f"<StoredKernel {self.path}, shape={self.shape}, {self.format.name}>"


def check_finite(path: str, value: np.ndarray) -> None:
    """Raises unless all weights of a kernel are finite.

    Raises:
        ValueError: Says how many are not.
    """
    if not np.isfinite(value).all():
        raise ValueError(
            f"{path}: {np.sum(~np.isfinite(value))} of {value.size} weights are infinite or no "
            "number, so it cannot be quantised. Check the checkpoint, or leave the layer out: a "
            "pattern that matches it with the value None."
        )


def _autocast_dtype() -> str:
    """The dtype in which Keras reads variables at the moment."""
    from keras.src.backend.common.variables import get_autocast_scope

    scope = get_autocast_scope()
    return keras.backend.standardize_dtype((scope and scope.dtype) or "float32")


class _Once:
    """Reads and quantises a kernel for the first of its parts, and keeps the others for theirs."""

    def __init__(self, read: Callable[[], Any], kernel: StoredKernel) -> None:
        self._read, self._kernel = read, kernel
        self._parts: dict[str, np.ndarray] = {}

    def take(self, name: str) -> np.ndarray:
        if name not in self._parts:
            self._parts = self._kernel.quantize(self._read())
        return self._parts.pop(name)


class _Part:
    """Initialiser of one of a kernel's variables."""

    def __init__(self, once: _Once, name: str) -> None:
        self._once, self._name = once, name

    def __call__(self, shape: Any, dtype: Any = None) -> np.ndarray:
        return self._once.take(self._name)

    def clone(self) -> _Part:
        return self
