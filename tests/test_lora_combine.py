"""Combining adapters: every type against the same rule written down in NumPy."""

from __future__ import annotations

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
from tfimm_lora.weights.names import is_lora_weight

L = keras.layers
WEIGHTS = [0.7, -0.4]
ADDITIVE = [
    name for name, method in METHODS.items() if not method.in_place and method.combines == "sum"
]


def base_model(kind: str = "small") -> keras.Model:
    if kind != "small":
        return tiny_model(kind, depth=1) if kind == "vit" else tiny_model(kind)
    layers = (
        L.Conv2D(8, 3, name="conv"),
        L.Conv2D(8, 3, groups=2, padding="same", name="grouped"),
        L.DepthwiseConv2D(3, name="depthwise"),
        L.EinsumDense("bhwc,cde->bhwde", (None, None, 2, 5), bias_axes="de", name="einsum"),
        L.Reshape((-1, 10), name="rows"),
        L.Dense(6, name="top"),
    )
    return randomize(sequential(*layers, shape=(8, 7, 4)))


def batch(model: Any) -> np.ndarray:
    if hasattr(model, "cfg"):
        return images(model)
    return np.random.default_rng(1).standard_normal((3, 8, 7, 4)).astype("float32")


def two(kind: str = "small", second: dict[str, Any] | None = None, **fields: Any) -> keras.Model:
    """A model with the adapters ``a`` and ``b``, both with random values."""
    fields = {"lora_rank": 4, "lora_alpha": 6.0, "lora_train_classifier": False, **fields}
    model = lora.convert_to_lora_model(base_model(kind), lora_adapter_name="a", **fields)
    lora.add_adapter(model, "b", **{**fields, **(second or {})})
    return randomize(
        model, 3, only=lambda leaf: is_lora_weight(leaf) and "vera_projection" not in leaf
    )


def kernels(model: keras.Model, *names: str) -> dict[str, np.ndarray]:
    """Kernels of the regular model with some adapters."""
    if not names:
        with lora.disable_adapters(model):
            found = values(lora.convert_to_regular_model(model))
    else:
        before = lora.active_adapters(model)
        lora.set_adapter(model, names)
        found = values(lora.convert_to_regular_model(model))
        lora.set_adapter(model, before)
    return {k: v.astype("float64") for k, v in found.items()}


def update(model: keras.Model, name: str) -> dict[str, np.ndarray]:
    base = kernels(model)
    return {k: v - base[k] for k, v in kernels(model, name).items()}


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert any(np.abs(v).max() > 1e-3 for v in expected.values())
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=2e-5, atol=2e-6, err_msg=path)


def weighted(model: keras.Model, weights: list[float] = WEIGHTS) -> dict[str, np.ndarray]:
    a, b = update(model, "a"), update(model, "b")
    return {k: weights[0] * a[k] + weights[1] * b[k] for k in a}


@pytest.mark.parametrize("kind", ["small", "vit", "convnext"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_cat_is_the_weighted_sum(kind, method, tmp_path):
    second = {"lora_rank": 2, "lora_alpha": 3.0}
    model = two(kind, second, lora_method=method)
    before, outputs = values(model), numpy(model(batch(model)))
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab", "cat")
    assert lora.adapter_names(model) == ("a", "b", "ab")
    assert lora.active_adapters(model) == ("a",)
    np.testing.assert_array_equal(numpy(model(batch(model))), outputs)
    assert_same_bits({k: v for k, v in values(model).items() if k in before}, before)
    ranks = {layer.adapters["ab"].updates[0].site.rank for layer in lora.lora_layers(model)}
    assert ranks == {6}
    close(update(model, "ab"), weighted(model))
    # It is an adapter like any other: saved, loaded, trained, deleted.
    lora.set_adapter(model, "ab")
    expected = numpy(model(batch(model)))
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        numpy(keras.saving.load_model(tmp_path / "m.keras")(batch(model))), expected
    )
    lora.delete_adapter(model, "a")
    lora.delete_adapter(model, "b")
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        numpy(keras.saving.load_model(tmp_path / "m.keras")(batch(model))), expected
    )


def test_slices(tmp_path):
    model = two("vit", lora_targets=("attn.q", "attn.v"))
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab", "cat")
    assert {u.site.name for la in lora.lora_layers(model) for u in la.adapters["ab"].updates} == {
        "q",
        "v",
    }
    close(update(model, "ab"), weighted(model))
    lora.set_adapter(model, "ab")
    lora.save_adapter(model, tmp_path, "ab")
    again = lora.load_adapter(base_model("vit"), tmp_path / "ab")
    assert relative_error(again(batch(again)), model(batch(model))) <= 1e-5


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_linear_combines_factors_with_the_roots_of_the_weights(method):
    model = two(lora_method=method)
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab")
    scale = 6.0 / (4 if method == "lora" else 2)
    for layer in lora.lora_layers(model):
        a, b, ab = (layer.adapters[n].updates[0] for n in ("a", "b", "ab"))
        assert ab.scaling == pytest.approx(1.0) and ab.site.rank == 4
        for name, signs in (("kernel_lora_a", (1, -1)), ("kernel_lora_b", (1, 1))):
            want = sum(
                sign * np.sqrt(abs(w) * scale) * numpy(u.variables[name])
                for u, w, sign in zip((a, b), WEIGHTS, signs, strict=True)
            )
            np.testing.assert_allclose(numpy(ab.variables[name]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind_of_sum", ["linear", "svd", "cat"])
def test_one_adapter_alone_is_scaled(kind_of_sum):
    model = two()
    lora.combine_adapters(model, ["b"], [-0.5], "half", kind_of_sum)
    close(update(model, "half"), {k: -0.5 * v for k, v in update(model, "b").items()})


@pytest.mark.parametrize("method", ADDITIVE)
def test_svd_of_every_method_is_the_best_low_rank_sum(method):
    fields: dict[str, Any] = {"lora_method": method, "lora_targets": ("conv", "top")}
    model = two(**fields)
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "whole", "svd", svd_rank=36)
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "thin", "svd", svd_rank=3)
    expected = weighted(model)
    close(update(model, "whole"), expected)
    thin = update(model, "thin")
    layers = {layer.name: layer for layer in lora.lora_layers(model)}
    assert {la.adapters["thin"].arguments["lora_method"] for la in layers.values()} == {
        method if method in ("lora", "rslora") else "lora"
    }
    for name, layer in layers.items():
        matrix = np.asarray(
            layer.operation.to_matrix(layer, expected[f"{name}/kernel"].astype("float32"))
        )
        got = np.asarray(layer.operation.to_matrix(layer, thin[f"{name}/kernel"].astype("float32")))
        singular = np.linalg.svd(matrix, compute_uv=False)
        rank = int((singular > 1e-4 * singular[0]).sum())
        assert np.linalg.matrix_rank(got, tol=1e-4 * singular[0]) == min(3, rank)
        left = np.sqrt(np.sum(singular[3:] ** 2))
        assert np.linalg.norm(got - matrix) == pytest.approx(left, rel=1e-3, abs=1e-4)


def test_svd_of_a_whole_and_of_slices_and_with_groups():
    model = two("vit", {"lora_targets": ("attn.q", "mlp.fc1")}, lora_targets=("attn.qkv",))
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab", "svd", svd_rank=8)
    close(update(model, "ab"), weighted(model))
    model = two(lora_targets=("grouped", "depthwise", "einsum"))
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab", "svd", svd_rank=16)
    close(update(model, "ab"), weighted(model))


def test_clamp_cuts_both_sides():
    model = two(lora_targets=("top",))
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "all", "svd")
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "cut", "svd", svd_clamp=0.9)
    (layer,) = lora.lora_layers(model)
    every, cut = (layer.adapters[n].updates[0].numpy_values() for n in ("all", "cut"))
    flat = np.concatenate([v.reshape(-1) for v in every.values()])
    bound = np.quantile(np.abs(flat), 0.8)
    for name, value in every.items():
        np.testing.assert_allclose(cut[name], np.clip(value, -bound, bound), atol=1e-2 * bound)


def signs(stack: np.ndarray, majority: str) -> np.ndarray:
    votes = stack.sum(axis=0) if majority == "total" else np.sign(stack).sum(axis=0)
    return np.where(votes >= 0, 1, -1)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_elects_signs(majority):
    """Entry by entry, written out with loops."""
    model = two(lora_targets=("top",))
    lora.combine_adapters(
        model, ["a", "b"], WEIGHTS, "ab", "ties", density=0.5, majority_sign_method=majority
    )
    (layer,) = lora.lora_layers(model)
    a, b, ab = (layer.adapters[n].updates[0].numpy_values() for n in ("a", "b", "ab"))
    for name, sign in (("kernel_lora_a", -1.0), ("kernel_lora_b", 1.0)):
        pruned = []
        for value in (a[name], b[name]):
            kept = sorted(np.abs(value).reshape(-1))[-(value.size // 2) :]
            pruned.append(np.where(np.abs(value) >= kept[0], value, 0.0))
        roots = [np.sqrt(0.7 * 1.5), sign * np.sqrt(0.4 * 1.5)]
        elected = signs(np.stack(pruned), majority)
        want = np.zeros_like(a[name])
        for index in np.ndindex(want.shape):
            agree = [
                w * p[index]
                for w, p in zip(roots, pruned, strict=True)
                if np.sign(p[index]) == elected[index]
            ]
            want[index] = sum(agree) / max(len(agree), 1)
        np.testing.assert_allclose(ab[name], want, rtol=1e-5, atol=1e-6)


def test_magnitude_prune_of_whole_updates():
    model = two(lora_targets=("top",))
    lora.combine_adapters(
        model, ["a", "b"], WEIGHTS, "ab", "magnitude_prune_svd", density=0.3, svd_rank=6
    )
    want = 0.0
    for name, weight in zip("ab", WEIGHTS, strict=True):
        value = update(model, name)["top/kernel"]
        kept = np.sort(np.abs(value).reshape(-1))[-int(0.3 * value.size) :]
        want = want + weight * np.where(np.abs(value) >= kept[0] - 1e-9, value, 0.0)
    np.testing.assert_allclose(update(model, "ab")["top/kernel"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_is_seeded_and_right_on_average(rule):
    """The mean over many seeds is the combination of what is not dropped."""
    from tfimm_lora.lora.combination_rules import combine_tensors

    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal((5, 4)) for _ in WEIGHTS]
    many = [
        combine_tensors(rule, tensors, WEIGHTS, 0.6, "total", np.random.default_rng(seed))
        for seed in range(4000)
    ]
    if rule == "dare_linear":
        want = sum(w * t for w, t in zip(WEIGHTS, tensors, strict=True))
    else:  # every entry is kept or not: four cases, each with its probability
        want = np.zeros((5, 4))
        for first in (0, 1):
            for second in (0, 1):
                share = (0.6 if first else 0.4) * (0.6 if second else 0.4)
                stack = np.stack([first * tensors[0] / 0.6, second * tensors[1] / 0.6])
                agrees = np.sign(stack) == signs(stack, "total")
                mixed = (stack * np.array(WEIGHTS)[:, None, None] * agrees).sum(axis=0)
                want += share * mixed / np.maximum(agrees.sum(axis=0), 1)
    assert np.abs(np.mean(many, axis=0) - want).max() < 0.06
    assert np.std(many, axis=0).max() > 0.3
    model = two(lora_targets=("top",))
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        lora.combine_adapters(model, ["a", "b"], WEIGHTS, name, rule, density=0.6, seed=seed)
    x, y, z = (update(model, name)["top/kernel"] for name in "xyz")
    np.testing.assert_array_equal(x, y)
    assert np.abs(x - z).max() > 1e-2


def test_ia3_adds_gains():
    fields = {"lora_method": "ia3", "lora_targets": ("conv", "top"), "lora_rank": 4}
    model = two("small", {"lora_targets": ("top",)}, **{**fields, "lora_alpha": None})
    lora.combine_adapters(model, ["a", "b"], [0.25, 0.75], "ab")
    layers = {layer.name: layer.adapters for layer in lora.lora_layers(model)}
    gains = {
        name: {n: a.updates[0].numpy_values()["ia3_l"] for n, a in found.items()}
        for name, found in layers.items()
    }
    top, conv = gains["top"], gains["conv"]
    np.testing.assert_allclose(top["ab"], 0.25 * top["a"] + 0.75 * top["b"], rtol=1e-6)
    # Where b has no gain it leaves the layer as it is.
    np.testing.assert_allclose(conv["ab"], 0.25 * conv["a"] + 0.75, rtol=1e-6)


def test_a_classifier_of_one_adapter_is_taken_over():
    model = lora.convert_to_lora_model(
        base_model("vit"), lora_adapter_name="a", lora_rank=2, lora_train_classifier=True
    )
    lora.add_adapter(model, "b", lora_rank=2, lora_train_classifier=False)
    randomize(model, 3, only=is_lora_weight)
    randomize(model, 4, only="head")
    head = values(model)["head/kernel"]
    for name in ("x", "y"):
        lora.combine_adapters(model, ["b", "a"], [0.5, 0.5], name, "cat")
        lora.set_adapter(model, "b")  # the owner need not be active
    lora.set_adapter(model, "x")
    np.testing.assert_array_equal(values(model)["head/kernel"], head)
    first = numpy(model(batch(model)))
    lora.set_adapter(model, "y")
    np.testing.assert_array_equal(numpy(model(batch(model))), first)
    with lora.disable_adapters(model):
        np.testing.assert_array_equal(
            numpy(model(batch(model))), numpy(base_model("vit")(batch(model)))
        )


def test_biases_of_the_updates_add_up():
    options = {"bias": True}
    model = two(lora_targets=("conv", "top"), lora_options=options)
    lora.combine_adapters(model, ["a", "b"], WEIGHTS, "ab", "cat")
    expected = weighted(model)
    assert np.abs(expected["top/bias"]).max() > 1e-2
    close(update(model, "ab"), expected)


def test_extractor():
    extractor = FeatureExtractor(two("vit"), [0])
    lora.combine_adapters(extractor, ["a", "b"], WEIGHTS, "ab", "cat")
    assert lora.adapter_names(extractor) == ("a", "b", "ab")


HEAD = {"lora_train_classifier": True}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, {"names": ["a", "c"]}, "has no adapter 'c'"),
    ({}, {}, {"names": []}, "list of one adapter or more"),
    ({}, {}, {"names": "ab"}, "list of one adapter or more"),
    ({}, {}, {"names": ["a", "a"]}, "named twice"),
    ({}, {}, {"name": "b"}, "has an adapter 'b' already"),
    ({}, {}, {"weights": [1.0]}, "Every adapter needs a weight"),
    ({}, {}, {"weights": [1.0, float("nan")]}, "Every adapter needs a weight"),
    ({}, {}, {"combination_type": "mean"}, "combination_type 'mean'"),
    ({}, {}, {"combination_type": "ties"}, "ties needs a density"),
    ({}, {}, {"combination_type": "dare_linear_svd", "density": 0.0}, "needs a density"),
    ({}, {}, {"combination_type": "cat", "density": 0.5}, "prunes nothing"),
    ({}, {}, {"combination_type": "svd", "svd_rank": 0}, "svd_rank has to be an integer"),
    ({}, {}, {"combination_type": "svd", "svd_clamp": 2.0}, "svd_clamp has to be in"),
    ({}, {}, {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "'x'"),
    ({}, {"lora_rank": 2}, {}, "the ranks are {'a': 4, 'b': 2}. Use combination_type='cat'"),
    ({}, {"lora_method": "rslora"}, {}, r"different methods cannot be combined: a \(lora\), b"),
    ({"lora_method": "dora"}, {}, {"combination_type": "svd"}, r"cannot combine a \(dora\)"),
    ({"lora_method": "loha"}, {}, {"combination_type": "cat"}, r"cannot combine a \(loha\)"),
    ({"lora_method": "ia3"}, {}, {"combination_type": "svd"}, r"cannot combine a \(ia3\)"),
    ({"lora_options": {"bias": True}}, {"lora_options": {}}, {}, "lora_options of the adapters"),
    (HEAD, HEAD, {}, "'a' and 'b' train weights of the model itself"),
    ({}, {"lora_train_bias": "all"}, {}, "'b' train weights of the model itself"),
    ({"lora_targets": ("attn.qkv",)}, {"lora_targets": ("attn.q",)}, {}, "as a whole by one"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused_and_unchanged(number):
    first, second, arguments, message = REFUSED[number]
    fields = {"lora_targets": ("mlp.fc1",), "lora_alpha": None, **first}
    model = two("vit", second, **fields)
    before, names = values(model), lora.adapter_names(model)
    flags = [v.trainable for v in model.variables]
    call = {"names": ["a", "b"], "weights": WEIGHTS, "name": "new", **arguments}
    with pytest.raises(ValueError, match=message):
        lora.combine_adapters(model, **call)
    assert lora.adapter_names(model) == names
    assert [v.trainable for v in model.variables] == flags
    assert_same_bits(values(model), before)
