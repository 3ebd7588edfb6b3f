"""What lets a Keras layer store its frozen kernel in any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.quantization.format import FakeFormat, KernelFormat, PackedFormat
from tfimm_lora.quantization.group_size import (
    check_group_size,
    divides,
    divisors,
    fitted_group_size,
)
from tfimm_lora.quantization.kernel_matrix import from_matrix, matrix_shape, to_matrix
from tfimm_lora.quantization.recompute import apply_recomputed
from tfimm_lora.quantization.registry import kernel_format
from tfimm_lora.quantization.stored_kernel import StoredKernel, check_finite
from tfimm_lora.weights.names import variable_value


class StoresKernel:
    """Mixin of Keras layers with a kernel that can be stored in a format.

    ``layer.kernel`` is the float variable, or a :class:`StoredKernel` if the format is packed.

    Attributes:
        kernel_format: The format; ``None`` for float.
        kernel_group_size: Rows of a group; ``None`` for the format's default.
        kernel_rounding: How a matrix is turned into what is stored, by format, matrix and group
            size; ``None`` for the format's own rounding.
    """

    kernel_format: KernelFormat | None = None
    kernel_group_size: int | None = None
    kernel_rounding: Callable[[PackedFormat, np.ndarray, int], dict[str, np.ndarray]] | None = None
    _fit_kernel: bool = False

    # What the Keras layer behind this mixin brings.
    built: bool
    bias: Any
    kernel: Any
    compute_dtype: str
    name: str
    path: str
    _tracker: Any
    _trainable_variables: Any
    _untrack_variable: Any

    def set_kernel_format(
        self, name: str | None, group_size: int | None = None, fit: bool = False
    ) -> None:
        """Stores the kernel in another format, in place.

        Args:
            name: Name of the format; ``None`` for float, with the values that the kernel has now.
            group_size: Rows that share a scale; has to divide the rows of the kernel.
            fit: Take the nearest divisor of the rows where the size does not divide them, and leave
                a kernel in float that would not be half as large. Defaults to ``False``.

        Raises:
            ValueError: The format is unknown, or the groups do not fit.
        """
        format = kernel_format(name)
        check_group_size(group_size)
        if format is None and group_size is not None:
            raise ValueError(
                f"Layer {self.name!r}: a group size of {group_size} needs a format. Name one, or "
                "leave the group size out."
            )
        self._fit_kernel = fit
        if self.built:
            shape = tuple(self.kernel.shape)
            format = self._worthwhile(format, group_size, shape)
            if format is not None:
                self._check_groups(format, group_size, shape)
            self._convert(format, group_size)
        self.kernel_format, self.kernel_group_size = format, group_size

    def _worthwhile(
        self, format: KernelFormat | None, group_size: int | None, shape: tuple[int, ...]
    ) -> KernelFormat | None:
        """The format; ``None`` if a kernel that is fitted would not become half as large."""
        if not self._fit_kernel or not isinstance(format, PackedFormat):
            return format
        rows, outputs = matrix_shape(self, shape)
        size = format.bytes(rows, outputs, self._check_groups(format, group_size, shape))
        return format if 2 * size <= 4 * rows * outputs else None

    def _check_groups(
        self, format: KernelFormat, group_size: int | None, shape: tuple[int, ...]
    ) -> int:
        """Rows of a group, checked."""
        rows = matrix_shape(self, shape)[0]
        wanted = format.default_group_size if group_size is None else group_size
        if wanted is None or wanted >= rows:
            return rows
        if not divides(wanted, rows):
            if group_size is None or self._fit_kernel:
                return fitted_group_size(wanted, rows)
            near = ", ".join(map(str, divisors(rows)))
            raise ValueError(
                f"Layer {self.name!r}: a group of {group_size} rows does not divide the {rows} "
                f"rows of its kernel. Use one of {near}, or None for all rows."
            )
        return wanted

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``add_weight``, that puts a packed kernel in the place of the float one."""
        format, name = self.kernel_format, kwargs.get("name")
        if name != "kernel" or format is None:
            return super().add_weight(*args, **kwargs)  # type: ignore[misc]
        shape = tuple(kwargs["shape"] if "shape" in kwargs else args[0])
        group_size = self._check_groups(format, self.kernel_group_size, shape)
        format = self.kernel_format = self._worthwhile(format, self.kernel_group_size, shape)
        if not isinstance(format, PackedFormat):
            return super().add_weight(*args, **kwargs)  # type: ignore[misc]
        return StoredKernel(self, format, group_size, shape, kwargs["initializer"])

    def _convert(self, format: KernelFormat | None, group_size: int | None) -> None:
        """Exchanges the variables that hold the kernel."""
        old, shape = self.kernel, tuple(self.kernel.shape)
        if not isinstance(old, StoredKernel) and not isinstance(format, PackedFormat):
            return
        if self.is_stored_as(format, group_size):
            # Rounding once more would not give the same codes where calibration has chosen them.
            return
        value = variable_value(old)
        holder = "_kernel" if "_kernel" in vars(self) else "kernel"
        with unlocked(self._tracker):
            if isinstance(format, PackedFormat):
                groups = self._check_groups(format, group_size, shape)
                new: Any = StoredKernel(self, format, groups, shape, lambda *_: value)
            else:
                new = super().add_weight(  # type: ignore[misc]
                    name="kernel", shape=shape, initializer=lambda *_, **__: value
                )
                # First, as in a layer that was built so: some of Keras' files have no names.
                self._trainable_variables.insert(0, self._trainable_variables.pop())
                new.trainable = False
            for variable in old.variables.values() if isinstance(old, StoredKernel) else [old]:
                self._untrack_variable(variable)
            setattr(self, holder, new)

    def check_kernel(self, name: str | None) -> None:
        """Raises if the kernel of a built layer has values that a format cannot store.

        Args:
            name: Name of the format; ``None`` for float.

        Raises:
            ValueError: It is not finite.
        """
        if isinstance(kernel_format(name), PackedFormat):
            check_finite(f"{self.path}/kernel", variable_value(self.kernel))

    def is_stored_as(self, format: KernelFormat | None, group_size: int | None) -> bool:
        """Whether the kernel is packed in a format already.

        Args:
            format: The format.
            group_size: Rows that share a scale; ``None`` for the format's default.
        """
        kernel = self.kernel
        if not isinstance(kernel, StoredKernel) or format is None or kernel.format != format:
            return False
        rows = kernel.sides[0]
        wanted = format.default_group_size if group_size is None else group_size
        return kernel.group_size == fitted_group_size(rows if wanted is None else wanted, rows)

    def needed_format(
        self, name: str | None, group_size: int | None
    ) -> tuple[str | None, int | None]:
        """Name of the format and group size that the layer takes where others are wanted."""
        return name, group_size

    def stored_variables(self) -> list[Any]:
        """The variables of kernel and bias, those of a packed kernel one by one."""
        packed = isinstance(self.kernel, StoredKernel)
        kernel = list(self.kernel.variables.values()) if packed else [self.kernel]
        return kernel if self.bias is None else [*kernel, self.bias]

    def kernel_to_quantize(
        self, value: np.ndarray, stored: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """What is stored of a float kernel that is assigned; by default all of it.

        Args:
            value: The kernel.
            stored: Quantises and dequantises a kernel.
        """
        return value

    @property
    def group_size(self) -> int | None:
        """Rows that share a scale in this layer's kernel; ``None`` for a float kernel."""
        if self.kernel_format is None:
            return None
        shape = tuple(self.kernel.shape)
        return self._check_groups(self.kernel_format, self.kernel_group_size, shape)

    def kernel_tensor(self, inputs: Any = None) -> Any:
        """The kernel's value as a tensor, as the layer uses it.

        Args:
            inputs: What it will be applied to: a packed kernel is not dequantised before.
        """
        if isinstance(self.kernel, StoredKernel):
            with self.kernel.read_behind(inputs):
                return ops.convert_to_tensor(self.kernel)
        kernel = ops.convert_to_tensor(self.kernel)
        if not isinstance(self.kernel_format, FakeFormat):
            return kernel
        rounded = self.fake_quantize(kernel)
        if not self.kernel.trainable:
            return rounded
        # Zero, with the gradient of the identity: a kernel that is trained learns to be quantised.
        return rounded + (kernel - ops.stop_gradient(kernel))

    def fake_quantize(self, kernel: Any) -> Any:
        """A kernel, rounded as the layer's fake format says; without gradient."""
        format = self.kernel_format
        assert isinstance(format, FakeFormat)
        value = ops.cast(ops.stop_gradient(kernel), "float32")
        group_size = self.group_size
        rounded = format.fake_quantize(to_matrix(self, value), group_size)  # type: ignore[arg-type]
        return ops.cast(from_matrix(self, rounded, tuple(kernel.shape)), kernel.dtype)

    def apply_frozen(self, apply: Any, inputs: Any, kernel: Any) -> Any:
        """Applies the kernel; one that is dequantised or rounded is so again for the gradient.

        Args:
            apply: Takes inputs and a kernel.
            inputs: The inputs.
            kernel: What :meth:`kernel_tensor` has returned.
        """
        stored, dtype = self.kernel, self.compute_dtype
        if isinstance(stored, StoredKernel):
            return apply_recomputed(
                apply, inputs, stored.tensors(), lambda t: stored.dequantize(t, dtype)
            )
        if isinstance(self.kernel_format, FakeFormat) and not stored.trainable:
            # The backward pass is outside of the scope in which Keras casts variables.
            return apply_recomputed(
                apply,
                inputs,
                (ops.convert_to_tensor(stored),),
                lambda t: ops.cast(self.fake_quantize(t[0]), dtype),
            )
        return apply(inputs, kernel)


def kernel_tensor(layer: Any) -> Any:
    """The value of any layer's kernel as a tensor, see :meth:`StoresKernel.kernel_tensor`."""
    stores = isinstance(layer, StoresKernel)
    return layer.kernel_tensor() if stores else ops.convert_to_tensor(layer.kernel)


class unlocked:
    """Lets a built layer take new variables for a moment."""

    def __init__(self, tracker: Any) -> None:
        self._tracker, self._locked = tracker, tracker.locked

    def __enter__(self) -> None:
        self._tracker.unlock()

    def __exit__(self, *error: Any) -> None:
        if self._locked:
            self._tracker.lock()
