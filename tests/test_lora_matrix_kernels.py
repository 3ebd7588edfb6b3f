"""The third axis of the matrix: every method x every operation x every format of the kernel.

The promises of ``test_lora_matrix.py`` that a kernel's format could break. The base model that an
adapted one is compared with has the kernels that the stored numbers stand for.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_resumed,
    assert_same_bits,
    gradients,
    numpy,
    randomize,
    relative_error,
    values,
)
from tests.quantized import PACKED, all_weights, input_gradient, packed_layers
from tests.test_lora_matrix import ADAPTING, ALWAYS, SITES, Site, adapted, batch
from tfimm_lora import lora
from tfimm_lora.quantization import FORMATS, StoresKernel
from tfimm_lora.weights.names import is_lora_weight, is_stored, named_variables

KERNELS = tuple(FORMATS)
# Of the slow cells some formats stand for the others: those that compute in other ways.
DIFFERENT = ("fake-int4", "int4", "nf4")


@pytest.fixture(autouse=True)
def _small_kernels_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites' kernels are so small that packing some of them would not be worth it."""
    monkeypatch.setattr(StoresKernel, "_worthwhile", lambda self, format, *_: format)


def _cells(costly: bool) -> Any:
    found = []
    for name, site in SITES.items():
        for method in ADAPTING:
            for kernel in KERNELS if method == "lora" or name == "dense" else DIFFERENT:
                if method == "qalora" and kernel.endswith("-row-scaled"):
                    continue  # refused, see test_quantization_calibrated.py
                sample = method == "lora" or kernel == "int4"
                usual = name == "dense" and (sample or not costly)
                usual |= name in ALWAYS and method == "lora" and not costly
                marks = () if usual else pytest.mark.slow
                found.append(
                    pytest.param(site, method, kernel, id=f"{name}-{method}-{kernel}", marks=marks)
                )
    return pytest.mark.parametrize(("site", "method", "kernel"), found)


each_cell = _cells(costly=False)
each_costly_cell = _cells(costly=True)


def quantized(
    site: Site, method: str, kernel: str, seed: int | None = 3, **fields: Any
) -> keras.Model:
    """A LoRA model of the site; 8 bits with a scale per output, 4 bits with groups of 3 rows."""
    options = {"group_size": 6} if method == "qalora" else {}
    size = 3 if "int4" in kernel or (method == "qalora" and kernel != "nf4") else None
    fields = {"lora_quantization": kernel, "lora_group_size": size, **fields}
    model = adapted(site, method, seed=seed, lora_options=options, **fields)
    layers = set(lora.lora_layers(model))
    assert layers and all(la.kernel_format is not None for la in layers)
    packed = set(packed_layers(model))
    assert layers <= packed if kernel in PACKED else not packed
    return model


def base_of(site: Site, model: keras.Model) -> keras.Model:
    """The regular model with the kernels that those of a LoRA model stand for."""
    base = site.base()
    kernels = {v.path: v for v in named_variables(base)}
    for v in named_variables(model):
        if v.leaf == "kernel" and v.layer.kernel_format is not None:
            kernels[v.path].variable.assign(numpy(v.layer.kernel_tensor()))
    return base


@each_cell
def test_step_zero_is_the_base_with_the_kernels_that_are_stored(
    site: Site, method: str, kernel: str
):
    x, model = batch(site), quantized(site, method, kernel, seed=None)
    base = base_of(site, model)
    error = relative_error(numpy(base(x)), site.base()(x))
    assert 1e-4 < error < 1.0, "rounding changes something, and not everything"
    assert relative_error(model(x), base(x)) <= 1e-6
    # Exact with respect to those kernels, not to what they were before.
    assert relative_error(input_gradient(model, x), input_gradient(base, x)) <= 1e-5


@each_cell
def test_merged_equals_unmerged_and_unmerging_restores_the_bits(
    site: Site, method: str, kernel: str
):
    model, x = quantized(site, method, kernel), batch(site)
    assert relative_error(model(x), base_of(site, model)(x)) > 1e-2
    outputs, weights = numpy(model(x)), all_weights(model)
    lora.merge_lora_weights(model)
    assert relative_error(model(x), outputs) <= 1e-5
    lora.unmerge_lora_weights(model)
    assert_same_bits(all_weights(model), weights)
    assert np.array_equal(numpy(model(x)), outputs)
    regular = lora.convert_to_regular_model(model)
    assert values(regular).keys() == values(site.base()).keys()
    assert relative_error(regular(x), outputs) <= 1e-5


@each_cell
def test_only_the_update_has_gradients(site: Site, method: str, kernel: str):
    model = quantized(site, method, kernel)
    found = gradients(model, batch(site))
    for v in named_variables(model):
        if is_lora_weight(v.leaf) and not v.leaf.startswith("vera_projection"):
            assert np.isfinite(found[v.path]).all() and np.any(found[v.path]), v.path
        else:
            assert not v.variable.trainable and found[v.path] is None, v.path


@each_cell
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_saved_and_loaded_again(site: Site, method: str, kernel: str, merged: bool, tmp_path):
    model, x = quantized(site, method, kernel), batch(site)
    outputs, weights = numpy(model(x)), all_weights(model)
    if merged:
        lora.merge_lora_weights(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = quantized(site, method, kernel, seed=None)
    again.load_weights(tmp_path / "model.weights.h5")
    for found in (loaded, again):
        assert_same_bits(all_weights(found), weights)
        assert np.array_equal(numpy(found(x)), outputs)
    for old, new in zip(lora.lora_layers(model), lora.lora_layers(loaded), strict=True):
        assert new.get_config() == old.get_config()


@each_costly_cell
def test_compiled_equals_eager(site: Site, method: str, kernel: str):
    model, x = quantized(site, method, kernel), batch(site)
    outputs = numpy(model(x))
    for jit in (False, True):
        model.compile(jit_compile=jit)
        assert relative_error(model.predict(x, verbose=0), outputs) <= 1e-5


@each_costly_cell
def test_a_step_leaves_the_codes_alone_and_a_reloaded_model_goes_on_alike(
    site: Site, method: str, kernel: str, tmp_path
):
    model, x = quantized(site, method, kernel), batch(site)
    before = all_weights(model)
    target = np.zeros(numpy(model(x)).shape, "float32")
    model.compile(keras.optimizers.Adam(0.01), "mean_squared_error")
    model.fit(x, target, shuffle=False, verbose=0)
    for v in model.weights:
        assert np.array_equal(numpy(v), before[v.path]) != v.trainable, v.path
    kernels = {tuple(layer.kernel.shape) for layer in packed_layers(model)}
    assert not kernels & {tuple(v.shape) for v in model.optimizer.variables}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, target, shuffle=False, verbose=0)
    assert_resumed(list(all_weights(loaded).values()), list(all_weights(model).values()))


@each_costly_cell
def test_mixed_precision(site: Site, method: str, kernel: str):
    x = batch(site)
    expected = numpy(quantized(site, method, kernel)(x))
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = quantized(site, method, kernel)
    assert keras.backend.standardize_dtype(model(x).dtype) == "bfloat16"
    for layer in packed_layers(model):
        assert {str(v.dtype) for v in layer.kernel.variables.values()} <= {
            "int8", "uint8", "float32",
        }  # fmt: skip
    assert relative_error(keras.ops.cast(model(x), "float32"), expected) <= 0.15
    found = gradients(model, x, training=True)
    trained = [v.path for v in named_variables(model) if v.variable.trainable]
    assert trained and all(np.isfinite(found[p].astype("float32")).all() for p in trained)


@each_costly_cell
def test_adapter_on_a_base_of_the_same_format(site: Site, method: str, kernel: str, tmp_path):
    """The adapter's file has no kernel, so it fits the base with which it was trained."""
    model, x = quantized(site, method, kernel), batch(site)
    if method == "dora":  # rounds once, see test_lora_matrix.py
        lora.load_adapter(model, lora.save_adapter(model, tmp_path / "rounded"))
    outputs = numpy(model(x))
    lora.save_adapter(model, tmp_path)
    other = randomize(quantized(site, method, kernel, seed=None), 9, only=is_lora_weight)
    lora.load_adapter(other, tmp_path, check_base=True)
    assert np.array_equal(numpy(other(x)), outputs)
    assert [v.path for v in named_variables(other) if is_stored(v.variable)] == [
        v.path for v in named_variables(model) if is_stored(v.variable)
    ]
