"""Keras layers with a packed kernel and no adapter, for inference and for regular models."""

from __future__ import annotations

from typing import Any

import keras

from tfimm_lora.quantization.layer import StoresKernel
from tfimm_lora.quantization.registry import kernel_format
from tfimm_lora.quantization.stored_kernel import StoredKernel


class QuantizedLayer(StoresKernel):
    """Mixin that lets a Keras layer be built with a packed kernel; the rest is the Keras layer's.

    See :class:`QuantizedDense` for the arguments.
    """

    bias: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        quantization, group_size = kwargs.pop("quantization", None), kwargs.pop("group_size", None)
        super().__init__(*args, **kwargs)
        self.store_kernel_as(quantization, group_size)

    def store_kernel_as(
        self, quantization: str | None, group_size: int | None = None, fit: bool = False
    ) -> None:
        """Stores the kernel in another format, in place.

        Args:
            quantization: See :class:`QuantizedDense`.
            group_size: See :class:`QuantizedDense`.
            fit: See :meth:`StoresKernel.set_kernel_format`.

        Raises:
            ValueError: The format is unknown or a fake one, or the groups do not fit.
        """
        format = kernel_format(quantization, "quantization")
        if format is not None and not format.packed:
            raise ValueError(
                f"quantization={quantization!r} is for training. Without adapters, store the "
                f"kernel as {quantization.removeprefix('fake-')!r}."  # type: ignore[union-attr]
            )
        self.set_kernel_format(quantization, group_size, fit)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The Keras layer's call, which reads the kernel when the inputs are there."""
        if not isinstance(self.kernel, StoredKernel):
            return super().call(inputs)  # type: ignore[misc]
        with self.kernel.read_behind(inputs):
            return super().call(inputs)  # type: ignore[misc]

    def save_own_variables(self, store: Any) -> None:
        """Writes the packed kernel and the bias by name."""
        if self.kernel_format is None:
            super().save_own_variables(store)  # type: ignore[misc]
            return
        for variable in self.stored_variables():
            store[variable.name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Reads what :meth:`save_own_variables` wrote."""
        if self.kernel_format is None:
            super().load_own_variables(store)  # type: ignore[misc]
            return
        for variable in self.stored_variables():
            variable.assign(store[variable.name])

    def get_config(self) -> dict[str, Any]:
        """The Keras layer's config with the format."""
        name = None if self.kernel_format is None else self.kernel_format.name
        size = self.group_size if self.built else self.kernel_group_size
        return {**super().get_config(), "quantization": name, "group_size": size}  # type: ignore[misc]


@keras.saving.register_keras_serializable(package="tfimm_lora")
class QuantizedDense(QuantizedLayer, keras.layers.Dense):
    """``keras.layers.Dense`` with a packed kernel.

    Args:
        units: Number of outputs.
        quantization: ``int8``, ``int4`` or ``nf4``, see :data:`FORMATS`; ``None`` for float.
        group_size: Rows of the kernel that share a scale; has to divide its rows. Defaults to one
            scale per output (``nf4``: 64, or the nearest divisor).
        **kwargs: All other arguments of ``keras.layers.Dense``.

    Raises:
        ValueError: The format is unknown; or, when built, the groups do not fit.

    Example:
        >>> y = QuantizedDense(10, quantization="int4", group_size=16)(x)
    """


@keras.saving.register_keras_serializable(package="tfimm_lora")
class QuantizedConv2D(QuantizedLayer, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` with a packed kernel.

    Args:
        filters: Number of filters.
        kernel_size: Height and width of the kernel.
        **kwargs: ``quantization`` and ``group_size`` as for :class:`QuantizedDense`, and all other
            arguments of ``keras.layers.Conv2D``.

    Raises:
        ValueError: As for :class:`QuantizedDense`.

    Example:
        >>> y = QuantizedConv2D(64, 3, quantization="int8")(x)
    """


@keras.saving.register_keras_serializable(package="tfimm_lora")
class QuantizedDepthwiseConv2D(QuantizedLayer, keras.layers.DepthwiseConv2D):
    """``keras.layers.DepthwiseConv2D`` with a packed kernel.

    Args:
        kernel_size: Height and width of the kernel.
        **kwargs: ``quantization`` and ``group_size`` as for :class:`QuantizedDense`, and all other
            arguments of ``keras.layers.DepthwiseConv2D``.

    Raises:
        ValueError: As for :class:`QuantizedDense`.

    Example:
        >>> y = QuantizedDepthwiseConv2D(7, padding="same", quantization="int8")(x)
    """


@keras.saving.register_keras_serializable(package="tfimm_lora")
class QuantizedEinsumDense(QuantizedLayer, keras.layers.EinsumDense):
    """``keras.layers.EinsumDense`` with a packed kernel.

    Args:
        equation: The einsum equation; its kernel may have no axis that is neither summed over nor
            new.
        output_shape: Shape of the output without batch.
        **kwargs: ``quantization`` and ``group_size`` as for :class:`QuantizedDense`, and all other
            arguments of ``keras.layers.EinsumDense``.

    Raises:
        ValueError: As for :class:`QuantizedDense`; or, when built, the equation has no such matrix.

    Example:
        >>> y = QuantizedEinsumDense("abc,cd->abd", (None, 16), quantization="nf4")(x)
    """


QUANTIZED_LAYERS: dict[type, type] = {
    cls.__bases__[1]: cls
    for cls in (QuantizedDense, QuantizedConv2D, QuantizedDepthwiseConv2D, QuantizedEinsumDense)
}
"""Quantised layers by the Keras layer that they stand for."""
