"""Outputs and gradients under quantised kernels, against float64 in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import numpy, randomize, relative_error, sequential
from tests.quantized import FAKE, PACKED
from tfimm_lora import lora
from tfimm_lora.quantization import FORMATS, StoresKernel
from tfimm_lora.weights.names import named_variables

L = keras.layers
TOLERANCE = 1e-5
RANK, ALPHA = 4, 6.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and its kernel as a convolution's: (height, width, inputs of a group, outputs)."""

    create: Callable[[], keras.layers.Layer]
    shape: tuple[int, ...]
    window: tuple[int, int] = (1, 1)
    groups: int = 1
    stride: int = 1

    def taps(self, x: np.ndarray) -> Any:
        """Inputs of all outputs, for each position of the window."""
        height, width = self.window
        rows = (x.shape[1] - height) // self.stride + 1
        columns = (x.shape[2] - width) // self.stride + 1
        for i in range(height):
            for j in range(width):
                yield (
                    (i, j),
                    np.s_[
                        :,
                        i : i + self.stride * rows : self.stride,
                        j : j + self.stride * columns : self.stride,
                    ],
                )

    def groups_of(self, channels: int) -> list[slice]:
        size = channels // self.groups
        return [slice(g * size, (g + 1) * size) for g in range(self.groups)]

    def apply(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        total: Any = 0.0
        for (i, j), where in self.taps(x):
            pieces = [
                x[where][..., own] @ kernel[i, j][:, out]
                for own, out in zip(
                    self.groups_of(x.shape[-1]), self.groups_of(kernel.shape[-1]), strict=True
                )
            ]
            total = total + np.concatenate(pieces, axis=-1)
        return total

    def gradients(self, x: np.ndarray, kernel: np.ndarray, upstream: np.ndarray) -> Any:
        """Of inputs and kernel."""
        dx, dk = np.zeros_like(x), np.zeros_like(kernel)
        for (i, j), where in self.taps(x):
            for own, out in zip(
                self.groups_of(x.shape[-1]), self.groups_of(kernel.shape[-1]), strict=True
            ):
                dx[where][..., own] += upstream[..., out] @ kernel[i, j][:, out].T
                dk[i, j][:, out] += np.einsum(
                    "bhwi,bhwo->io", x[where][..., own], upstream[..., out]
                )
        return dx, dk


CASES = {
    "dense": Case(lambda: L.Dense(10, name="site"), (5, 12)),
    "conv2d": Case(lambda: L.Conv2D(10, (3, 2), name="site"), (7, 6, 6), (3, 2)),
    "conv2d_groups": Case(
        lambda: L.Conv2D(8, 3, strides=2, groups=2, name="site"), (7, 7, 6), (3, 3), 2, 2
    ),
    "depthwise": Case(
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2, name="site"), (6, 6, 4), (3, 3), 4
    ),
    "einsum_heads": Case(
        lambda: L.EinsumDense("abc,cde->abde", (None, 2, 6), bias_axes="de", name="site"), (5, 12)
    ),
    "einsum_merge_heads": Case(
        lambda: L.EinsumDense("abcd,cde->abe", (None, 10), name="site"), (5, 3, 4)
    ),
}
each_case = pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
each_format = pytest.mark.parametrize("name", [*FAKE, *PACKED])


@pytest.fixture(autouse=True)
def _small_kernels_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoresKernel, "_worthwhile", lambda self, format, *_: format)


def quantized(case: Case, name: str | None, **fields: Any) -> tuple[keras.Model, Any]:
    """A model of one layer, and the layer."""
    base = randomize(sequential(case.create(), shape=case.shape))
    fields = {"lora_method": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, **fields}
    if fields["lora_method"] == "lora":
        fields |= {"lora_targets": ("site",), "lora_train_classifier": False}
    size = 3 if name and "int4" in name else None
    model = lora.convert_to_lora_model(base, lora_quantization=name, lora_group_size=size, **fields)
    randomize(model, 3, only=lambda leaf: "lora" in leaf)
    return model, next(la for la in model._flatten_layers() if la.name == "site")


def found_gradients(model: Any, x: np.ndarray, mix: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
    """Outputs, and gradients of sum(outputs * mix) for inputs and trained weights by name."""
    trained = model.trainable_variables
    names = [v.path.rpartition("/")[2] for v in trained]
    if keras.backend.backend() == "jax":
        import jax

        rest = [v.value for v in model.non_trainable_variables]

        def loss(inputs: Any, variables: Any) -> Any:
            y, _ = model.stateless_call(variables, rest, inputs, training=True)
            return keras.ops.sum(y * mix), y

        values = [v.value for v in trained]
        of_inputs, of_weights = jax.grad(loss, (0, 1), has_aux=True)(x, values)[0]
        return numpy(model(x, training=True)), of_inputs, dict(zip(names, of_weights, strict=True))
    import tensorflow as tf

    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = model(inputs, training=True)
        value = tf.reduce_sum(y * mix)
    of_inputs, of_weights = tape.gradient(value, (inputs, [v.value for v in trained]))
    return y.numpy(), of_inputs, dict(zip(names, of_weights, strict=True))


def check(case: Case, model: Any, layer: Any, kernel: np.ndarray, updated: bool) -> None:
    """Compares outputs and all gradients of a layer that applies ``kernel`` (+ A B).

    Args:
        case: The case.
        model: The model.
        layer: The layer.
        kernel: What the stored kernel stands for.
        updated: Whether A B is added, as a path of its own.
    """
    generator = np.random.default_rng(1)
    x = generator.standard_normal((3, *case.shape)).astype("float32")
    shape = numpy(model(x)).shape
    mix = generator.standard_normal(shape).astype("float32")
    y, dx, found = found_gradients(model, x, mix)

    def as_convolution(k: Any) -> np.ndarray:
        count = case.window[0] * case.window[1]
        k = numpy(k).astype("float64")
        if layer.operation.layer_class is L.DepthwiseConv2D:
            return k.reshape(*case.window, 1, -1)
        inner = int(np.prod(case.shape[-2:])) if k.ndim == 3 and len(shape) == 3 else case.shape[-1]
        return k.reshape(*case.window, inner // case.groups, k.size * case.groups // inner // count)

    kernel64 = as_convolution(kernel)
    inner = kernel64.shape[2] * case.groups
    x64 = x.astype("float64").reshape(
        len(x), *(case.shape[:2] if case.window != (1, 1) else (1, -1)), inner
    )
    whole, factors = kernel64, None
    if updated:
        a = numpy(layer.kernel_lora_a).astype("float64").reshape(-1, RANK)
        b = numpy(layer.kernel_lora_b).astype("float64").reshape(-1, kernel64.shape[-1])
        # Groups of a convolution have ranks of their own; a depthwise one is a matrix as it is.
        groups = case.groups if layer.operation.layer_class is L.Conv2D else 1
        a, b = np.split(a, groups, axis=1), np.split(b, groups, axis=1)
        factors = list(zip(a, b, strict=True))
        update = np.concatenate([p @ q for p, q in factors], axis=1)
        whole = kernel64 + ALPHA / RANK * update.reshape(kernel64.shape)
    up = mix.astype("float64").reshape(*case.apply(x64, whole).shape)
    bias = 0.0 if layer.bias is None else numpy(layer.bias).reshape(-1)
    assert relative_error(y.reshape(up.shape), case.apply(x64, whole) + bias) <= TOLERANCE
    wanted_dx, wanted_dk = case.gradients(x64, whole, up)
    assert relative_error(numpy(dx).reshape(wanted_dx.shape), wanted_dx) <= TOLERANCE
    if factors is None:
        assert (
            relative_error(numpy(found["kernel"]).reshape(wanted_dk.shape), wanted_dk) <= TOLERANCE
        )
        return
    pieces = np.split(wanted_dk.reshape(-1, wanted_dk.shape[-1]), len(factors), axis=1)
    scaled = [ALPHA / RANK * piece for piece in pieces]
    da = np.concatenate([d @ q.T for d, (_, q) in zip(scaled, factors, strict=True)], axis=1)
    db = np.concatenate([p.T @ d for d, (p, _) in zip(scaled, factors, strict=True)], axis=1)
    assert relative_error(numpy(found["kernel_lora_a"]).reshape(da.shape), da) <= TOLERANCE
    assert relative_error(numpy(found["kernel_lora_b"]).reshape(db.shape), db) <= TOLERANCE
    assert set(found) == {"kernel_lora_a", "kernel_lora_b"}


@each_case
@each_format
def test_lora_on_a_frozen_kernel(case: Case, name: str):
    model, layer = quantized(case, name)
    assert layer.kernel_format is FORMATS[name]
    check(case, model, layer, numpy(layer.kernel_tensor()), updated=True)


@each_case
@pytest.mark.parametrize("name", FAKE)
def test_a_kernel_that_is_trained_has_the_gradient_of_the_rounded_one(case: Case, name: str):
    """Straight through: as if the rounded kernel itself were the variable."""
    model, layer = quantized(case, name, lora_method="full")
    before = numpy(layer.kernel)
    rounded = numpy(layer.kernel_tensor())
    assert relative_error(rounded, before) > 1e-4
    check(case, model, layer, rounded, updated=False)
    model.compile(keras.optimizers.SGD(0.1), "mean_squared_error")
    x = np.random.default_rng(2).standard_normal((4, *case.shape)).astype("float32")
    model.fit(x, np.zeros(numpy(model(x)).shape, "float32"), verbose=0)
    kernel = numpy(layer.kernel)
    assert not np.array_equal(kernel, before)
    # It is the float kernel that is stored and trained; not all its values are on the grid.
    assert not np.allclose(kernel, numpy(layer.kernel_tensor()), atol=1e-5)


@each_case
@pytest.mark.parametrize("name", FAKE)
def test_a_kernel_that_is_rounded_with_its_update(case: Case, name: str):
    """Outputs and the gradient to the inputs are the rounded kernel's; A and B go straight."""
    model, layer = quantized(case, name, lora_quantize_merged=True)
    float_model, float_layer = quantized(case, None)
    composed = numpy(float_layer.adapted_kernel())
    rounded = numpy(layer.fake_quantize(keras.ops.convert_to_tensor(composed)))
    assert relative_error(rounded, composed) > 1e-4
    x = np.random.default_rng(1).standard_normal((3, *case.shape)).astype("float32")
    mix = np.random.default_rng(2).standard_normal(numpy(model(x)).shape).astype("float32")
    y, dx, found = found_gradients(model, x, mix)
    # A float layer whose kernel is the rounded one less A B has the same outputs and gradients.
    float_layer.kernel.assign(rounded - (composed - numpy(float_layer.kernel)))
    expected = found_gradients(float_model, x, mix)
    assert relative_error(y, expected[0]) <= TOLERANCE
    assert relative_error(dx, expected[1]) <= TOLERANCE
    assert set(found) == set(expected[2]) == {"kernel_lora_a", "kernel_lora_b"}
    for key, gradient in expected[2].items():
        assert relative_error(found[key], gradient) <= TOLERANCE
    # That model, merged, is quantised without loss.
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(numpy(layer.kernel_tensor()), rounded, rtol=1e-6, atol=1e-7)
    assert relative_error(model(x), y) <= TOLERANCE
    packed = FORMATS[name].packed_format
    regular = lora.convert_to_regular_model(model)
    after = lora.convert_to_lora_model(
        regular, lora_quantization=packed.name, lora_group_size=layer.group_size,
        lora_targets=("site",), lora_train_classifier=False,
    )  # fmt: skip
    assert relative_error(after(x), y) <= TOLERANCE


def test_moments_of_a_frozen_kernel_do_not_exist():
    model, _ = quantized(CASES["dense"], "fake-int4")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    kernels = {tuple(v.variable.shape) for v in named_variables(model) if v.leaf == "kernel"}
    assert not kernels & {tuple(v.shape) for v in model.optimizer.variables}
