"""Exchanging an adapter's values under compiled functions: same outputs, nothing traced anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    images,
    numpy,
    randomize,
    relative_error,
    sequential,
    tiny_model,
    values,
)
from tfimm_lora import lora
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.weights.names import is_lora_weight, named_variables

L = keras.layers
ADAPTING = [name for name, method in METHODS.items() if not method.in_place]
IN_PLACE = [name for name, method in METHODS.items() if method.in_place]
# Whose update has a rank and a scaling.
RANKED = [n for n in ADAPTING if n not in ("ia3", "oft", "boft")]


def small() -> keras.Model:
    layers = (
        L.Conv2D(8, 3, strides=2, padding="same", activation="gelu", name="conv"),
        L.Conv2D(8, 1, name="point"),
        L.LayerNormalization(name="norm"),
        L.GlobalAveragePooling2D(name="pool"),
        L.Dense(12, activation="gelu", name="one"),
        L.Dense(6, name="top"),
    )
    return randomize(sequential(*layers, shape=(8, 6, 4)))


def base_model(kind: str) -> keras.Model:
    if kind == "small":
        return small()
    return tiny_model(kind, depth=1) if kind == "vit" else tiny_model(kind)


def batch(model: Any) -> np.ndarray:
    if hasattr(model, "cfg"):
        return images(model, 4)
    return np.random.default_rng(1).standard_normal((4, 8, 6, 4)).astype("float32")


def adapted(kind: str, method: str, seed: int, **fields: Any) -> keras.Model:
    """A LoRA model whose adapter has random values, in the weights of the model itself as well."""
    options: dict[str, Any] = {"lora_train_classifier": False}
    if METHODS[method].trains_classifier:
        options = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the adapter has")
        model = lora.convert_to_lora_model(
            base_model(kind), lora_method=method, **{**options, **fields}
        )
    randomize(model, seed, only=is_lora_weight_to_train)
    name = lora.active_adapters(model)[0]
    generator = np.random.default_rng(seed)
    for v in model._adapter_state.own_weights(model, name):
        noise = generator.standard_normal(v.variable.shape)
        v.variable.assign(v.variable + (0.1 * noise).astype("float32"))
    return model


def is_lora_weight_to_train(leaf: str) -> bool:
    return is_lora_weight(leaf) and not leaf.startswith("vera_projection")


def saved(model: keras.Model, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PEFT")
        return lora.save_adapter(model, folder)


def compiled(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """Compiles a model, and runs all its functions once; returns targets for ``fit``."""
    y = np.zeros(numpy(model(x)).shape, "float32")
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for _ in range(2):
        model.fit(x, y, batch_size=4, verbose=0)
    model.predict(x, verbose=0)
    model.evaluate(x, y, verbose=0)
    return y


def check_swap(
    model: keras.Model,
    folder: Path,
    fresh: keras.Model,
    traces: list[int],
    step: bool = False,
    tolerance: float = 2e-5,
) -> None:
    """After a swap all compiled functions answer as a freshly loaded model, without a new trace."""
    x = batch(fresh)
    y = compiled(model, x)
    expected = numpy(fresh(x))
    seen, paths = traces[0], list(values(model))
    lora.swap_adapter(model, folder)
    found = model.predict(x, verbose=0)
    loss = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=4, verbose=0)
    after = model.predict(x, verbose=0)
    assert traces[0] == seen, "something was traced again"
    assert list(values(model)) == paths
    assert relative_error(found, expected) <= tolerance
    assert loss == pytest.approx(float(np.mean(expected**2)), rel=1e-4)
    assert relative_error(after, found) > 1e-4, "fit trained nothing"
    if step:
        fresh.compile(keras.optimizers.SGD(0.05), "mse")
        fresh.fit(x, y, batch_size=4, verbose=0)
        assert relative_error(after, fresh(x)) <= tolerance


@pytest.mark.parametrize("method", ADAPTING)
def test_every_method_with_lower_ranks_another_scaling_and_fewer_layers(method, traces, tmp_path):
    ranked = method in RANKED
    fields = {"lora_rank": 4, "lora_alpha": 6.0} if ranked else {}
    model = adapted("small", method, 1, **fields, lora_targets=("conv", "point", "one"))
    if method == "oft":
        fewer = {}
    fewer = (
        {
            "lora_rank": 2,
            "lora_alpha": 5.0,
            "lora_rank_pattern": {"one": 3},
            "lora_alpha_pattern": {"conv": 1.5},
        }
        if ranked
        else {}
    )
    if method in ("vera", "adalora"):  # one rank and one alpha for all layers in PEFT's files
        fewer = {"lora_rank": 2, "lora_alpha": 5.0}
    source = adapted("small", method, 2, **fewer, lora_targets=("conv", "one"))
    folder = saved(source, tmp_path)
    fresh = lora.load_adapter(base_model("small"), folder)
    check_swap(model, folder, fresh, traces)


@pytest.mark.parametrize("method", IN_PLACE)
def test_methods_in_place(method, traces, tmp_path):
    model, source = (adapted("small", method, seed) for seed in (1, 2))
    folder = saved(source, tmp_path)
    fresh = lora.load_adapter(base_model("small"), folder)
    check_swap(model, folder, fresh, traces, step=True)


@pytest.mark.parametrize("kind", ["small", "vit", "convnext"])
@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("rslora", "dora", "loha", "ia3"))],
)
def test_the_next_step_is_that_of_a_freshly_loaded_model(kind, method, traces, tmp_path):
    """With the same scaling, of any rank: the zeros that pad stay zeros."""
    root = 0.5 if method == "rslora" else 1.0
    fields = [
        {"lora_rank": r, "lora_alpha": 2.0 * r**root, "lora_train_classifier": True} for r in (4, 2)
    ]
    model, source = (adapted(kind, method, i, **f) for i, f in enumerate(fields))
    folder = saved(source, tmp_path)
    fresh = lora.load_adapter(base_model(kind), folder)
    check_swap(model, folder, fresh, traces, step=True)


def test_slices_biases_and_an_inactive_adapter(traces, tmp_path):
    fields = {"lora_targets": ("attn.q", "attn.v"), "lora_train_bias": "lora_only"}
    model = adapted("vit", "lora", 1, lora_rank=3, **fields)
    source = adapted(
        "vit", "lora", 2, lora_rank=3, lora_rank_pattern={"attn.v": 1}, lora_alpha=4.0, **fields
    )
    folder = saved(source, tmp_path)
    fresh = lora.load_adapter(base_model("vit"), folder)
    lora.add_adapter(model, "other", lora_rank=3, **fields)
    x = batch(fresh)
    y, seen = compiled(model, x), None
    outputs = model.predict(x, verbose=0)
    seen = traces[0]
    lora.swap_adapter(model, folder, "other")
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    model.fit(x, y, batch_size=4, verbose=0)
    assert traces[0] == seen
    lora.set_adapter(model, "other")
    assert relative_error(model(x), fresh(x)) <= 2e-5
    with lora.disable_adapters(model):
        np.testing.assert_array_equal(numpy(model(x)), numpy(base_model("vit")(x)))


def test_what_the_other_adapter_lacks_becomes_the_base_models(tmp_path):
    model = adapted("vit", "lora", 1, lora_train_classifier=True, lora_train_bias="all")
    source = adapted("vit", "lora", 2, lora_targets=("mlp.fc1",))
    folder = saved(source, tmp_path)
    lora.swap_adapter(model, folder)
    x = batch(model)
    assert relative_error(model(x), source(x)) <= 2e-5
    base = values(base_model("vit"))
    found = values(model)
    for path in base:
        assert found[path].tobytes() == base[path].tobytes(), path


def test_there_and_back_again_is_the_same_to_the_bit(traces, tmp_path):
    """Two adapters of the full rank take turns, as a server would let them."""
    first, second = (adapted("convnext", "lora", seed, lora_rank=3) for seed in (1, 2))
    folders = [saved(m, tmp_path / name) for m, name in ((first, "1"), (second, "2"))]
    x = batch(first)
    first.compile()
    expected = [first.predict(x, verbose=0), numpy(second(x))]
    weights, seen = values(first), traces[0]
    for number in (1, 0, 1, 0):
        lora.swap_adapter(first, folders[number])
        assert relative_error(first.predict(x, verbose=0), expected[number]) <= 2e-5
    assert traces[0] == seen
    assert_same_bits(values(first), weights)


def test_first_factors_of_pissa(tmp_path):
    """Their difference is an update of twice the rank, which a plain adapter can hold."""
    source = adapted("small", "lora", 2, lora_init="pissa", lora_rank=2, lora_targets=("one",))
    folder = saved(source, tmp_path / "pissa")
    x = batch(source)
    for fields in ({"lora_rank": 4}, {"lora_rank": 4, "lora_init": "pissa"}):
        model = adapted("small", "lora", 1, lora_targets=("one", "top"), **fields)
        lora.swap_adapter(model, folder)
        assert relative_error(model(x), source(x)) <= 2e-5
    plain = adapted("small", "lora", 3, lora_rank=4, lora_targets=("one",))
    lora.swap_adapter(model, saved(plain, tmp_path / "plain"))
    assert relative_error(model(x), plain(x)) <= 2e-5


def test_extractor(tmp_path):
    extractor = FeatureExtractor(adapted("vit", "lora", 1, lora_rank=4), [0])
    source = adapted("vit", "lora", 2, lora_rank=2)
    lora.swap_adapter(extractor, saved(source, tmp_path))
    expected = numpy(FeatureExtractor(source, [0])(batch(source)))
    for found, want in zip(extractor.predict(batch(source), verbose=0), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rank": ("lora", {"lora_rank": 5}, "whose rank has to be at least the adapter's"),
    "method": ("rslora", {}, r"the saved adapter is 'rslora', 'default' is 'lora'"),
    "target": ("lora", {"lora_targets": ("mlp.fc1", "attn.proj")}, r"adapts .*attn/proj, which"),
    "whole": ("lora", {"lora_targets": ("attn.qkv",)}, r"qkv \(as a whole\), which"),
    "head": ("lora", {"lora_train_classifier": True}, "has its own head.weight"),
    "biases": ("lora", {"lora_train_bias": "all"}, "has its own .*bias"),
    "options": (
        "lora",
        {"lora_options": {"bias": True}, "lora_targets": ("mlp.fc1",)},
        "options are .*bias=True",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_and_unchanged(case, traces, tmp_path):
    method, fields, message = REFUSED[case]
    targets = ("mlp.fc1", "attn.q")
    model = adapted("vit", "lora", 1, lora_rank=4, lora_targets=targets)
    source = adapted("vit", method, 2, **{"lora_rank": 4, "lora_targets": targets, **fields})
    folder = saved(source, tmp_path)
    x = batch(model)
    compiled(model, x)
    before, seen, outputs = values(model), traces[0], model.predict(x, verbose=0)
    flags = [v.trainable for v in model.variables]
    with pytest.raises(ValueError, match=message):
        lora.swap_adapter(model, folder)
    assert [v.trainable for v in model.variables] == flags
    assert_same_bits(values(model), before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    assert traces[0] == seen


def test_another_base_and_an_ambiguous_name(tmp_path):
    model = adapted("vit", "lora", 1)
    folder = saved(model, tmp_path)
    other = lora.convert_to_lora_model(randomize(base_model("vit"), 9))
    before = values(other)
    with pytest.raises(ValueError, match="trained on other weights"):
        lora.swap_adapter(other, folder)
    assert_same_bits(values(other), before)
    lora.swap_adapter(other, folder, check_base=False)
    theirs = {v.path: numpy(v.variable) for v in named_variables(model) if is_lora_weight(v.leaf)}
    assert_same_bits({k: v for k, v in values(other).items() if k in theirs}, theirs)
    lora.add_adapter(model, "b")
    lora.set_adapter(model, ["default", "b"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, b\). Say which"):
        lora.swap_adapter(model, folder)
    with pytest.raises(ValueError, match="has no adapter 'c'"):
        lora.swap_adapter(model, folder, "c")
    with pytest.raises(FileNotFoundError):
        lora.swap_adapter(model, tmp_path / "nowhere", "b")
