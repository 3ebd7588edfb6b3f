"""LoftQ: factors that make up for what quantisation takes from the kernels."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.helpers import numpy, randomize, sequential, tiny_model
from tfimm_lora import lora
from tfimm_lora.lora.methods.initialization import factors_of_residual
from tfimm_lora.quantization import FORMATS

RANK, ALPHA = 4, 6.0
L = keras.layers
LAYERS = {
    "dense": (lambda: L.Dense(24, name="site"), (5, 64)),
    "convolution": (lambda: L.Conv2D(24, 3, name="site"), (7, 6, 8)),
    "einsum": (lambda: L.EinsumDense("abc,cde->abde", (None, 4, 6), name="site"), (5, 64)),
}


def base_of(kind: str) -> keras.Model:
    create, shape = LAYERS[kind]
    return randomize(sequential(create(), shape=shape))


def adapted(base: keras.Model, init: str | None, format: str = "nf4", **fields) -> keras.Model:
    fields = {"lora_targets": "site", "lora_rank": RANK, "lora_alpha": ALPHA, **fields}
    return lora.convert_to_lora_model(base, lora_init=init, lora_quantization=format, **fields)


def distance(model: keras.Model, base: keras.Model) -> float:
    """How far the adapted kernel is from the base model's float kernel."""
    (layer,) = lora.lora_layers(model)
    return np.linalg.norm(numpy(layer.adapted_kernel()) - numpy(base.get_layer("site").kernel))


@pytest.mark.parametrize("format", ["nf4", "int4", "int4-symmetric", "fake-int4", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_step_zero_is_nearer_to_the_float_model(kind, format):
    base = base_of(kind)
    plain = distance(adapted(base, None, format), base)
    once = distance(adapted(base, "loftq", format), base)
    often = distance(adapted(base, "loftq_niter_5", format), base)
    assert max(once, often) < plain


def test_one_step_is_the_best_update_of_its_rank():
    base = base_of("dense")
    (layer,) = lora.lora_layers(adapted(base, "loftq"))
    kernel = numpy(base.get_layer("site").kernel).astype("float64")
    rest = kernel - numpy(layer.kernel_tensor()).astype("float64")
    values = np.linalg.svd(rest, compute_uv=False)
    left = rest - numpy(layer.kernel_lora_a) @ numpy(layer.kernel_lora_b) * layer.scaling
    # Eckart and Young: no update of the rank leaves less.
    assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(values[RANK:]), rel=1e-5)


def test_several_steps_quantise_what_the_factors_leave():
    kernel = np.random.default_rng(0).standard_normal((64, 24)).astype("float32")
    format = FORMATS["int4"]

    def stored(matrix):
        return numpy(format.dequantize(format.quantize(matrix, 64), matrix.shape, 64))

    base, a, b = factors_of_residual(kernel, stored, 3, RANK, 1.5)
    expected = np.zeros_like(kernel)
    for _ in range(3):
        last = expected
        u, s, v = np.linalg.svd((kernel - stored(kernel - last)).astype("float64"))
        expected = ((u[:, :RANK] * s[:RANK]) @ v[:RANK]).astype("float32")
    np.testing.assert_allclose(base, kernel - last, atol=1e-5)
    np.testing.assert_allclose(a @ b * 1.5, expected, atol=1e-5)


def test_slices_have_factors_of_their_own():
    tiny_vit = tiny_model()
    fields = {"lora_targets": ["attn.q", "attn.v"], "lora_rank": 4, "lora_quantization": "int4"}
    plain = lora.convert_to_lora_model(tiny_vit, **fields)
    better = lora.convert_to_lora_model(tiny_vit, lora_init="loftq", **fields)
    kernels = {v.path: numpy(v) for v in tiny_vit.weights}
    for one, other in zip(lora.lora_layers(plain), lora.lora_layers(better), strict=True):
        float_kernel = next(k for p, k in kernels.items() if one.path.split("/", 1)[1] in p)
        width = float_kernel.shape[1] // 3
        errors = [
            [
                np.linalg.norm(
                    (numpy(la.adapted_kernel()) - float_kernel)[:, i * width :][:, :width]
                )
                for i in range(3)
            ]
            for la in (one, other)
        ]
        assert errors[1][0] < errors[0][0] and errors[1][2] < errors[0][2]
        assert errors[1][1] == errors[0][1]


def test_trained_factors_are_left_alone(tmp_path):
    base = base_of("dense")
    model = adapted(base, "loftq_niter_3")
    for v in lora.lora_layers(model)[0].lora_weights:
        v.assign(numpy(v) + 0.1)
    before = [numpy(w) for w in model.weights]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for now, then in zip(loaded.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(now), then)


def test_quantising_later_starts_from_the_float_kernel():
    base = base_of("dense")
    at_once = adapted(base, "loftq", "int4")
    later = adapted(base, "loftq", {"site": None, "*": "int8"})
    lora.quantize(later, "int4")
    assert distance(later, base) == pytest.approx(distance(at_once, base), rel=1e-6)


def test_bad_input():
    base = base_of("dense")
    with pytest.raises(ValueError, match=r"loftq.*they are float.*lora_quantization='nf4'"):
        lora.convert_to_lora_model(base, lora_init="loftq")
    grouped = sequential(L.Conv2D(8, 3, groups=2, name="site"), shape=(7, 7, 8))
    with pytest.raises(ValueError, match="takes a kernel as one matrix"):
        adapted(grouped, "loftq", lora_rank=4)
