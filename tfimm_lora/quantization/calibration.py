"""What a model's layers read: second moments and samples of inputs, for GPTQ and AWQ."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.quantization.kernel_matrix import einsum_letters, matrix_shape

_BATCH = 32
# Bytes of a convolution's patches that are made at a time.
_PATCH_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is kept of the inputs of a layer, whose kernel is a matrix (rows, outputs).

    An input is what one position of the output reads: a vector with one value for each row, in the
    order of the rows, which is torch's (channel, height, width) in convolutions.

    Attributes:
        count: Number of inputs that were summed up.
        mean_abs: Mean absolute value of each row's input, (rows,), float32.
        sample: Up to ``sample_size`` inputs, chosen evenly at random, (n, rows), float32.
        hessian: Sum of x x^T over all inputs, (rows, rows), float64; ``None`` if not asked for.
    """

    count: int
    mean_abs: np.ndarray
    sample: np.ndarray
    hessian: np.ndarray | None


def unserved_reason(layer: Any) -> str:
    """Why a layer's kernel cannot be calibrated.

    Args:
        layer: A built layer.

    Returns:
        A part of a sentence; empty for the layers that can be: ``Dense``, ``Conv2D`` without
        groups, and ``EinsumDense`` whose kernel is a matrix from summed to new axes.

    Example:
        >>> unserved_reason(model.head)
        ''
    """
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return "each output of a depthwise convolution reads a channel of its own"
    if isinstance(layer, keras.layers.Conv2D):
        return "each group of a convolution reads channels of its own" if layer.groups > 1 else ""
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            einsum_letters(layer)
        except ValueError:
            return f"the kernel in {layer.equation!r} is no matrix from summed to new axes"
        return ""
    if isinstance(layer, keras.layers.Dense):
        return ""
    return f"a {type(layer).__name__} has no kernel that is known here"


def capture_in_passes(
    model: keras.Model,
    layers: Sequence[Any],
    batches: Any,
    *,
    hessian: bool = True,
    sample_size: int = 256,
    max_bytes: int = 2**30,
) -> Iterator[dict[int, Statistics]]:
    """Runs calibration data through a model and sums up what some of its layers read.

    The model runs eagerly, in inference mode, and is not changed; the data run once for each part
    of the layers whose Hessians fit ``max_bytes``. A kernel that is changed between two passes is
    seen by the later ones, so that what a layer reads includes the errors of those that were
    quantised before it.

    Args:
        model: A built model.
        layers: Layers of the model to look at, see :func:`unserved_reason`. Passes take them in
            this order.
        batches: Inputs of the model: an array, or batches of them one after the other (of tuples
            the first element counts). A hundred images do. Read once for each pass.
        hessian: Whether to sum up x x^T, which GPTQ needs and AWQ does not. Defaults to ``True``.
        sample_size: Number of inputs of each layer that are kept. Defaults to 256.
        max_bytes: Memory for the Hessians of one pass. A layer that needs more is alone in its
            pass. Defaults to 1 GiB.

    Yields:
        Statistics of a pass's layers by ``id(layer)``.

    Raises:
        ValueError: A layer cannot be calibrated, there are no data, inputs are not finite, a layer
            was not called, or several passes are needed and ``batches`` can be read only once.

    Example:
        >>> for statistics in capture_in_passes(model, layers, images, max_bytes=2**28):
        ...     quantize_these(statistics)
    """
    for layer in layers:
        if not layer.built:
            raise ValueError(f"Layer {layer.name!r} is not built. Build the model first.")
        if reason := unserved_reason(layer):
            raise ValueError(
                f"{layer.path} cannot be calibrated: {reason}. Quantise it by rounding to nearest."
            )
    parts = _parts(layers, max_bytes if hessian else math.inf)
    if len(parts) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"The Hessians of {len(layers)} layers take {len(parts)} passes over the calibration "
            f"data with max_bytes={max_bytes}, and an iterator can be read once. Give an array or "
            "a list of batches, or raise max_bytes."
        )
    for part in parts:
        sums = {id(layer): _Sums(layer, hessian, sample_size) for layer in part}
        number = 0
        with contextlib.ExitStack() as stack:
            for layer in part:
                stack.enter_context(_captured(layer, sums[id(layer)].add))
            for batch in _batches(batches):
                model(ops.convert_to_tensor(batch), training=False)
                number += 1
        if not number:
            raise ValueError("There are no calibration data: an array or a list of batches needed.")
        yield {key: value.statistics() for key, value in sums.items()}


def input_rows(layer: Any, inputs: Any) -> Iterator[np.ndarray]:
    """What each position of a layer's output reads.

    Args:
        layer: A built layer that :func:`unserved_reason` has nothing against.
        inputs: The layer's inputs.

    Yields:
        Arrays (n, rows), float32, which together have a row for each position: their product with
        the kernel's matrix (rows, outputs) is the layer's output, without bias and activation.

    Example:
        >>> rows = np.concatenate(list(input_rows(layer, inputs)))
    """
    values = np.asarray(ops.convert_to_numpy(inputs)).astype("float32", copy=False)
    if isinstance(layer, keras.layers.Conv2D):
        yield from _patches(layer, values)
    elif isinstance(layer, keras.layers.EinsumDense):
        summed, _, _ = einsum_letters(layer)
        letters = layer.equation.replace(" ", "").split(",")[0]
        kept = "".join(c for c in letters if c not in summed)
        yield np.einsum(f"{letters}->{kept}{summed}", values).reshape(-1, _rows(layer))
    else:
        yield values.reshape(-1, values.shape[-1])


class _Sums:
    """What a layer has read so far."""

    def __init__(self, layer: Any, hessian: bool, sample_size: int) -> None:
        self.layer = layer
        self.rows = _rows(layer)
        self.count = 0
        self.total = np.zeros(self.rows)
        self.hessian = np.zeros((self.rows, self.rows)) if hessian else None
        self.sample_size = sample_size
        self.sample = np.zeros((0, self.rows), "float32")
        # The inputs with the smallest of one random number each are an even sample.
        self.lots = np.zeros(0)
        self.random = np.random.default_rng(0)

    def add(self, inputs: Any) -> None:
        """Adds the inputs of one call."""
        for rows in input_rows(self.layer, inputs):
            if not np.isfinite(rows).all():
                raise ValueError(
                    f"{self.layer.path} reads values that are not finite (NaN or infinite) from "
                    "the calibration data. Check the data and the model's weights."
                )
            self.count += len(rows)
            self.total += np.abs(rows).sum(axis=0, dtype="float64")
            if self.hessian is not None:
                self.hessian += rows.T @ rows
            self._draw(rows)

    def _draw(self, rows: np.ndarray) -> None:
        lots = self.random.random(len(rows))
        if len(self.lots) == self.sample_size > 0:
            kept = lots < self.lots.max()
            rows, lots = rows[kept], lots[kept]
        lots = np.concatenate([self.lots, lots])
        chosen = np.sort(np.argsort(lots, kind="stable")[: self.sample_size])
        self.sample, self.lots = np.concatenate([self.sample, rows])[chosen], lots[chosen]

    def statistics(self) -> Statistics:
        """The sums so far."""
        if not self.count:
            raise ValueError(
                f"{self.layer.path} got no input from the calibration data: the model does not "
                "call this layer. Leave it out."
            )
        mean_abs = (self.total / self.count).astype("float32")
        return Statistics(self.count, mean_abs, self.sample, self.hessian)


def _rows(layer: Any) -> int:
    return matrix_shape(layer, tuple(layer.kernel.shape))[0]


def _parts(layers: Sequence[Any], max_bytes: float) -> list[list[Any]]:
    """Cuts the layers into parts whose Hessians fit."""
    parts: list[list[Any]] = [[]]
    used = 0
    for layer in layers:
        size = 8 * _rows(layer) ** 2
        if parts[-1] and used + size > max_bytes:
            parts.append([])
            used = 0
        parts[-1].append(layer)
        used += size
    return parts


def _patches(layer: Any, values: np.ndarray) -> Iterator[np.ndarray]:
    """Patches (n, channels * height * width), a few images at a time.

    By slices: ``keras.ops.image.extract_patches`` is a convolution with a unit matrix, which is
    slow in large kernels and not exact on GPUs.
    """
    if layer.data_format == "channels_first":
        values = np.moveaxis(values, 1, -1)
    size, strides, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    if layer.padding == "same":
        pads = [(0, 0)]
        for n, r, s in zip(values.shape[1:3], reach, strides, strict=True):
            total = max((math.ceil(n / s) - 1) * s + r - n, 0)
            pads.append((total // 2, total - total // 2))
        values = np.pad(values, [*pads, (0, 0)])
    places = [(n - r) // s + 1 for n, r, s in zip(values.shape[1:3], reach, strides, strict=True)]
    rows = math.prod(size) * values.shape[-1]
    step = max(1, _PATCH_BYTES // max(4 * rows * math.prod(places), 1))
    for start in range(0, len(values), step):
        part = values[start : start + step]
        out = np.empty((len(part), *places, part.shape[-1], *size), "float32")
        for i, j in np.ndindex(*size):
            top, left = i * dilation[0], j * dilation[1]
            bottom = top + (places[0] - 1) * strides[0] + 1
            right = left + (places[1] - 1) * strides[1] + 1
            out[..., i, j] = part[:, top : bottom : strides[0], left : right : strides[1]]
        yield out.reshape(-1, rows)


@contextlib.contextmanager
def _captured(layer: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, a layer hands over its inputs when it is called."""
    call, own = layer.call, vars(layer).get("call")

    def call_and_take(*args: Any, **kwargs: Any) -> Any:
        take(args[0] if args else kwargs["inputs"])
        return call(*args, **kwargs)

    layer.call = call_and_take
    try:
        yield
    finally:
        if own is None:
            del layer.call
        else:
            layer.call = own


def _batches(batches: Any) -> Iterable[Any]:
    if hasattr(batches, "shape"):
        return (batches[i : i + _BATCH] for i in range(0, len(batches), _BATCH))
    return (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
