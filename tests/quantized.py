"""What packed kernels stand for, written down a second time in NumPy, and shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from tests.helpers import numpy
from tfimm_lora.quantization import FORMATS
from tfimm_lora.quantization.calibration import Statistics, capture_in_passes
from tfimm_lora.quantization.nf4 import NF4_VALUES, dynamic_values

PACKED = tuple(name for name, format in FORMATS.items() if format.packed)
FAKE = tuple(name for name, format in FORMATS.items() if not format.packed)


def repeated(values: Any, group_size: int) -> np.ndarray:
    """A value for each group and output as one for each row, float64."""
    return np.repeat(np.asarray(values, "float64"), group_size, axis=0)


def nibbles(packed: np.ndarray, rows: int) -> np.ndarray:
    """Codes of 4 bits one by one."""
    codes = np.empty((2 * len(packed), packed.shape[1]), "uint8")
    codes[0::2], codes[1::2] = packed % 16, packed // 16
    return codes[:rows]


def nf4_scales(tensors: Mapping[str, Any], rows: int, outputs: int, group_size: int) -> Any:
    """The doubly quantised scales, (groups, outputs), in float32 as they are computed."""
    values = dynamic_values()[tensors["absmax"]] * tensors["absmax_scale"][:, None]
    flat = (values + tensors["absmax_mean"]).reshape(-1)
    groups = rows // group_size
    return flat[: groups * outputs].reshape(outputs, groups).T


def dequantized(
    name: str, tensors: Mapping[str, Any], shape: tuple[int, int], group_size: int
) -> np.ndarray:
    """The matrix that stored tensors stand for, float64."""
    rows, outputs = shape
    four = "4" in name
    codes = nibbles(tensors["codes"], rows) if four else tensors["codes"]
    if name == "nf4":
        scales = nf4_scales(tensors, rows, outputs, group_size)
        return NF4_VALUES[codes].astype("float64") * repeated(scales, group_size)
    zero = repeated(tensors["zero"], group_size) if "zero" in tensors else 8.0 if four else 0.0
    values = (codes.astype("float64") - zero) * repeated(tensors["scale"], group_size)
    return values / tensors["row_scale"][:, None] if "row_scale" in tensors else values


def stored(layer: Any) -> dict[str, np.ndarray]:
    """What a layer's packed kernel is stored as."""
    return {name: numpy(v) for name, v in layer.kernel.variables.items()}


def packed_layers(model: keras.Model) -> list[Any]:
    """Layers whose kernel is packed."""
    return [la for la in model._flatten_layers() if hasattr(getattr(la, "kernel", None), "readers")]


def vit_small() -> Iterator[tuple[int, int]]:
    """Rows and outputs of the kernels of ``vit_small_patch16_224``."""
    yield 3 * 16 * 16, 384
    for _ in range(12):
        yield from [(384, 1152), (384, 384), (384, 1536), (1536, 384)]
    yield 384, 1000


def convnext_tiny() -> Iterator[tuple[int, int]]:
    """Rows and outputs of the kernels of ``convnext_tiny``."""
    yield 3 * 4 * 4, 96
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width > 96:
            yield 4 * width // 2, width
        for _ in range(depth):
            yield from [(49, width), (width, 4 * width), (4 * width, width)]
    yield 768, 1000


def all_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Every variable by path, those of packed kernels one by one."""
    return {v.path: numpy(v) for v in model.weights}


def input_gradient(model: Any, x: np.ndarray) -> np.ndarray:
    """Gradient of a random projection of the outputs for the inputs."""
    mix = np.random.default_rng(4).standard_normal(numpy(model(x)).shape).astype("float32")

    def loss(inputs: Any) -> Any:
        return keras.ops.sum(keras.ops.cast(model(inputs), "float32") * mix)

    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.grad(loss)(keras.ops.convert_to_tensor(x)))
    import tensorflow as tf

    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(inputs)
    return tape.gradient(value, inputs).numpy()


def capture(*args: Any, **kwargs: Any) -> dict[int, Statistics]:
    """What the layers read, of all passes together."""
    passes = capture_in_passes(*args, **kwargs)
    return {key: statistics for part in passes for key, statistics in part.items()}
