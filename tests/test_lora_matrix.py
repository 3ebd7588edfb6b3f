"""One matrix: every method x every operation x everything an adapted layer promises.

A method is a row of the package's ``METHODS``, an operation a row of ``SITES``. A site is a model
with exactly one place that is adapted, so that what holds for the model holds for the operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    gradients,
    numpy,
    randomize,
    relative_error,
    sequential,
    tiny_model,
    values,
)
from tfimm_lora import lora
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.operations import OPERATIONS
from tfimm_lora.weights.names import is_lora_weight, named_variables


@dataclasses.dataclass(frozen=True)
class Site:
    """A model with one place to adapt."""

    base: Callable[[], keras.Model]
    shape: tuple[int, ...]
    operation: type
    targets: tuple[str, ...] = ("site",)


def _layer_site(create: Callable[..., keras.layers.Layer], *shape: int, **config: Any) -> Site:
    operation = create
    return Site(
        lambda: randomize(sequential(create(name="site", **config), shape=shape)),
        shape,
        operation,  # type: ignore[arg-type]
    )


_L = keras.layers
SITES: dict[str, Site] = {
    "dense": _layer_site(_L.Dense, 5, 12, units=10),
    "dense_relu_without_bias": _layer_site(
        _L.Dense, 12, units=10, activation="relu", use_bias=False
    ),
    "conv2d": _layer_site(_L.Conv2D, 9, 8, 6, filters=10, kernel_size=3),
    "conv2d_strides_same": _layer_site(
        _L.Conv2D, 9, 8, 6, filters=10, kernel_size=(3, 2), strides=2, padding="same"
    ),
    "conv2d_dilation": _layer_site(
        _L.Conv2D, 9, 8, 6, filters=10, kernel_size=3, dilation_rate=(2, 1), activation="gelu"
    ),
    "conv2d_groups": _layer_site(
        _L.Conv2D, 9, 8, 6, filters=8, kernel_size=3, groups=2, strides=2, padding="same"
    ),
    "conv2d_1x1": _layer_site(_L.Conv2D, 5, 4, 12, filters=10, kernel_size=1, use_bias=False),
    "depthwise": _layer_site(
        _L.DepthwiseConv2D, 9, 8, 12, kernel_size=3, padding="same", strides=2
    ),
    "depthwise_multiplier": _layer_site(
        _L.DepthwiseConv2D, 9, 8, 6, kernel_size=3, depth_multiplier=2, dilation_rate=2
    ),
    "einsum_heads": _layer_site(
        _L.EinsumDense, 5, 12, equation="abc,cde->abde", output_shape=(None, 2, 6), bias_axes="de"
    ),
    "einsum_merge_heads": _layer_site(
        _L.EinsumDense, 5, 3, 4, equation="abcd,cde->abe", output_shape=(None, 10)
    ),
    "qkv_slices": Site(
        lambda: tiny_model("vit", depth=1), (16, 16, 3), _L.Dense, ("attn.q", "attn.v")
    ),
}

RANK = 4
ALPHA = 6.0
ADAPTING = [name for name, method in METHODS.items() if not method.in_place]
WITH_DROPOUT = [name for name in ADAPTING if METHODS[name].takes_dropout]
# These are always tested, the other sites with LoRA always and else in CI's sample.
ALWAYS = ("dense", "conv2d_strides_same", "depthwise", "qkv_slices")


def _cells(methods: list[str]) -> Any:
    return pytest.mark.parametrize(
        ("site", "method"),
        [
            pytest.param(
                site,
                method,
                id=f"{name}-{method}",
                marks=() if name in ALWAYS or method == "lora" else pytest.mark.slow,
            )
            for name, site in SITES.items()
            for method in methods
        ],
    )


each_cell = _cells(ADAPTING)
each_cell_with_dropout = _cells(WITH_DROPOUT)
each_method = pytest.mark.parametrize("method", ADAPTING)
each_method_with_dropout = pytest.mark.parametrize("method", WITH_DROPOUT)
each_site = pytest.mark.parametrize("site", [pytest.param(s, id=n) for n, s in SITES.items()])


def adapted(site: Site, method: str, seed: int | None = 3, **fields: Any) -> keras.Model:
    """A LoRA model of the site; its updates are random unless ``seed`` is ``None``."""
    model = lora.convert_to_lora_model(
        site.base(),
        **{"lora_method": method, "lora_rank": RANK, "lora_alpha": ALPHA,
           "lora_targets": site.targets, "lora_train_classifier": False, **fields},
    )  # fmt: skip
    return model if seed is None else randomize(model, seed, only=is_lora_weight)


def batch(site: Site, size: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((size, *site.shape)).astype("float32")


def test_every_operation_has_a_row():
    assert {site.operation for site in SITES.values()} == set(OPERATIONS)


@each_cell
def test_step_zero_is_the_base_to_the_bit(site: Site, method: str):
    base, model = site.base(), adapted(site, method, seed=None)
    x = batch(site)
    assert np.array_equal(numpy(model(x)), numpy(base(x)))
    assert np.array_equal(model.predict(x, verbose=0), base.predict(x, verbose=0))


@each_cell
def test_update_changes_the_outputs(site: Site, method: str):
    x = batch(site)
    assert relative_error(adapted(site, method)(x), site.base()(x)) > 1e-2


@each_cell
def test_merged_equals_unmerged_and_unmerging_restores_the_bits(site: Site, method: str):
    model, x = adapted(site, method), batch(site)
    outputs, weights = numpy(model(x)), values(model)
    lora.merge_lora_weights(model)
    assert all(layer.merged for layer in lora.lora_layers(model))
    assert relative_error(model(x), outputs) <= 1e-5
    lora.unmerge_lora_weights(model)
    assert not any(layer.merged for layer in lora.lora_layers(model))
    assert_same_bits(values(model), weights)
    assert np.array_equal(numpy(model(x)), outputs)


@each_cell
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_converted_to_regular_equals(site: Site, method: str, merged: bool):
    model, x, base = adapted(site, method), batch(site), site.base()
    outputs = numpy(model(x))
    if merged:
        lora.merge_lora_weights(model)
    regular = lora.convert_to_regular_model(model)
    assert not lora.lora_layers(regular)
    assert values(regular).keys() == values(base).keys()
    assert relative_error(regular(x), outputs) <= 1e-5
    assert all(v.trainable for v in regular.trainable_weights)
    assert len(regular.trainable_weights) == len(base.trainable_weights)


@each_cell
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_saved_and_loaded_again(site: Site, method: str, merged: bool, tmp_path):
    model, x = adapted(site, method), batch(site)
    outputs, weights = numpy(model(x)), values(model)
    trained = [v.path for v in model.trainable_weights]
    if merged:
        lora.merge_lora_weights(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert_same_bits(values(loaded), weights)
    assert np.array_equal(numpy(loaded(x)), outputs)
    assert [v.path for v in loaded.trainable_weights] == trained

    again = adapted(site, method, seed=None)
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same_bits(values(again), weights)
    assert np.array_equal(numpy(again(x)), outputs)


@each_cell
def test_config_round_trip(site: Site, method: str):
    dropout = 0.1 if METHODS[method].takes_dropout else 0.0
    model = adapted(site, method, lora_dropout=dropout, lora_train_bias="lora_only")
    again = type(model).from_config(model.get_config())
    assert again.get_config() == model.get_config()
    for layer in lora.lora_layers(model):
        config = layer.get_config()
        fresh = type(layer).from_config(config)
        assert fresh.get_config() == config
        assert fresh.lora_method == method
        fresh.build(layer.get_build_config()["input_shape"])
        shapes = {w.name: tuple(w.shape) for w in fresh.weights}
        assert shapes == {w.name: tuple(w.shape) for w in layer.weights}
        assert fresh.scaling == layer.scaling


@each_cell
@pytest.mark.parametrize("train_bias", ["none", "lora_only"])
def test_only_the_update_has_gradients(site: Site, method: str, train_bias: str):
    model = adapted(site, method, lora_train_bias=train_bias)
    found = gradients(model, batch(site))
    for v in named_variables(model):
        fixed = v.leaf.startswith("vera_projection")  # random, for all layers the same
        wanted = (is_lora_weight(v.leaf) and not fixed) or (
            train_bias == "lora_only" and v.leaf == "bias" and getattr(v.layer, "adapters", None)
        )
        if wanted:
            assert v.variable.trainable
            assert np.isfinite(found[v.path]).all()
            assert np.any(found[v.path]), v.path
        else:
            assert not v.variable.trainable, v.path
            assert found[v.path] is None, v.path


@each_cell
def test_compiled_equals_eager(site: Site, method: str):
    model, x = adapted(site, method), batch(site)
    outputs = numpy(model(x))
    for jit in (False, True):
        model.compile(jit_compile=jit)
        assert relative_error(model.predict(x, verbose=0), outputs) <= 1e-5


@each_cell
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(site: Site, method: str, policy: str):
    x = batch(site)
    expected = numpy(adapted(site, method)(x))
    keras.config.set_dtype_policy(policy)
    model = adapted(site, method)
    compute = policy.removeprefix("mixed_")
    for layer in lora.lora_layers(model):
        assert layer.compute_dtype == compute
        assert all(keras.backend.standardize_dtype(w.dtype) == "float32" for w in layer.weights)
    assert keras.backend.standardize_dtype(model(x).dtype) == compute
    tolerance = 0.15 if compute == "bfloat16" else 0.02
    assert relative_error(keras.ops.cast(model(x), "float32"), expected) <= tolerance
    found = gradients(model, x, training=True)
    trained = [v.path for v in named_variables(model) if v.variable.trainable]
    assert trained and all(np.isfinite(found[p].astype("float32")).all() for p in trained)
    lora.merge_lora_weights(model)
    assert relative_error(keras.ops.cast(model(x), "float32"), expected) <= tolerance


@each_cell_with_dropout
def test_dropout_acts_in_training_only(site: Site, method: str):
    model, x = adapted(site, method, lora_dropout=0.5), batch(site)
    outputs = numpy(adapted(site, method)(x))
    assert np.array_equal(numpy(model(x, training=False)), outputs)
    assert np.array_equal(model.predict(x, verbose=0), adapted(site, method).predict(x, verbose=0))
    first, second = (numpy(model(x, training=True)) for _ in range(2))
    assert not np.array_equal(first, outputs)
    assert not np.array_equal(first, second)
    # What is dropped is the input of the update alone: without update nothing is random.
    still = adapted(site, method, seed=None, lora_dropout=0.5)
    base = numpy(site.base()(x))
    assert np.array_equal(numpy(still(x, training=True)), base)


@each_method_with_dropout
@pytest.mark.parametrize("name", [n for n in SITES if n != "qkv_slices"])  # a softmax follows
def test_dropout_keeps_the_mean(name: str, method: str):
    site = SITES[name]
    model, x = adapted(site, method, lora_dropout=0.3), batch(site, 2)
    for layer in lora.lora_layers(model):
        layer.activation = None  # the mean of a rectified value is not the rectified mean
    many = np.repeat(x[:1], 4000, axis=0)
    mean = numpy(model(many, training=True)).mean(axis=0)
    expected = numpy(model(x[:1]))[0]
    assert relative_error(mean, expected) <= 0.15


@each_cell
@pytest.mark.filterwarnings("ignore:PEFT has no mergeable adapter")
def test_adapter_round_trip(site: Site, method: str, tmp_path):
    model, x = adapted(site, method, lora_train_bias="lora_only"), batch(site)
    randomize(model, 8, only="site/bias")
    if method == "dora":  # norm + difference, as PEFT has it, rounds: once, and then no more
        lora.load_adapter(model, lora.save_adapter(model, tmp_path / "rounded"))
    outputs, weights = numpy(model(x)), values(model)
    lora.save_adapter(model, tmp_path)
    loaded = lora.load_adapter(site.base(), tmp_path, check_base=True)
    assert_same_bits(values(loaded), weights)
    assert np.array_equal(numpy(loaded(x)), outputs)
    in_place = adapted(site, method, seed=9, lora_train_bias="lora_only")
    assert lora.load_adapter(in_place, tmp_path) is in_place
    assert_same_bits(values(in_place), weights)
    # Saving while merged saves the same adapter.
    lora.merge_lora_weights(model)
    lora.save_adapter(model, tmp_path / "merged")
    assert_same_bits(values(lora.load_adapter(site.base(), tmp_path / "merged")), weights)


@each_method
@pytest.mark.parametrize("name", ["dense", "conv2d_groups", "einsum_heads", "qkv_slices"])
def test_a_step_leaves_the_base_alone_and_a_reloaded_model_goes_on_alike(
    name: str, method: str, tmp_path
):
    site = SITES[name]
    model, x = adapted(site, method), batch(site)
    before = values(model)
    target = np.zeros(numpy(model(x)).shape, "float32")
    model.compile(keras.optimizers.Adam(0.01), "mean_squared_error")
    model.fit(x, target, shuffle=False, verbose=0)
    for v in named_variables(model):
        changed = not np.array_equal(numpy(v.variable), before[v.path])
        assert changed == v.variable.trainable, v.path
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, target, shuffle=False, verbose=0)
    assert_same_bits(values(loaded), values(model))


@each_site
def test_rslora_is_lora_with_another_scale(site: Site):
    x = batch(site)
    plain = adapted(site, "lora", lora_alpha=ALPHA * RANK**0.5)
    assert relative_error(adapted(site, "rslora")(x), plain(x)) <= 1e-6
    assert lora.lora_layers(adapted(site, "rslora"))[0].scaling == pytest.approx(ALPHA / 2)
    assert lora.lora_layers(adapted(site, "lora"))[0].scaling == pytest.approx(ALPHA / 4)


def test_the_published_table_has_every_cell():
    """Written by an earlier run with ``--write-matrix``: nothing is missing and nothing failed."""
    page = Path(__file__).resolve().parents[1] / "docs/results/matrix.md"
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line[:1] == "|"]
    assert [cell.strip(" `") for cell in rows[0][1:]] == ADAPTING
    assert [row[0].strip().replace(" ", "_") for row in rows[2:]] == list(SITES)
    assert all(cell.strip().isdigit() for row in rows[2:] for cell in row[1:])
