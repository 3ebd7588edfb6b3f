"""What is special to IA3, OFT and BOFT; what all methods promise is in test_lora_matrix.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.helpers import images, numpy, randomize, relative_error, sequential, tiny_model, values
from tfimm_lora import lora
from tfimm_lora.lora.methods.boft import butterfly
from tfimm_lora.lora.methods.ia3 import IA3
from tfimm_lora.lora.methods.rotation import (
    cayley,
    cayley_neumann,
    nearest_divisor,
    skew_from_triangle,
)
from tfimm_lora.weights.names import is_lora_weight

RNG = np.random.default_rng


def random_skew(blocks: int, size: int, scale: float = 0.3) -> np.ndarray:
    values = scale * RNG(0).standard_normal((blocks, size * (size - 1) // 2)).astype("float32")
    return numpy(skew_from_triangle(values, size))


@pytest.mark.parametrize(
    ("size", "wanted", "found"),
    [(64, 8, 8), (12, 32, 12), (54, 4, 3), (12, 5, 4), (9, 2, 1), (7, 4, 1), (768, 36, 32)],
)
def test_nearest_divisor(size, wanted, found):
    assert nearest_divisor(size, wanted) == found


def test_skew_is_read_row_by_row():
    expected = [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]
    found = numpy(skew_from_triangle(np.array([[1.0, 2, 3]], "float32"), 3))
    np.testing.assert_array_equal(found, [expected])


@pytest.mark.parametrize("size", [2, 5, 12])
def test_cayley_is_orthogonal_and_exact(size):
    skew = random_skew(3, size)
    rotation = numpy(cayley(skew))
    eye = np.eye(size)
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), [eye] * 3, atol=1e-5)
    expected = (eye - skew.astype("float64")) @ np.linalg.inv(eye + skew.astype("float64"))
    np.testing.assert_allclose(rotation, expected, atol=1e-5)
    assert np.linalg.det(rotation) == pytest.approx(np.ones(3), abs=1e-4)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8])
def test_series_of_so_many_terms(terms):
    skew = random_skew(2, 6, 0.05).astype("float64")
    power = [np.stack([np.linalg.matrix_power(q, i) for q in skew]) for i in range(terms + 2)]
    # PEFT's three terms are its four.
    count = 4 if terms == 3 else terms
    last = {1: power[0], 2: power[0] + 2 * power[1]}.get(count)
    expected = power[0] + 2 * sum(power[1 : count - 1]) + power[count - 1] if last is None else last
    np.testing.assert_allclose(cayley_neumann(skew.astype("float32"), terms), expected, atol=1e-6)
    if terms == 8:
        transposed = numpy(cayley(skew.astype("float32"))).transpose(0, 2, 1)
        np.testing.assert_allclose(expected, transposed, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "size", "factors"), [(32, 4, 1), (32, 4, 2), (32, 4, 4), (24, 2, 3)]
)
def test_butterfly_is_orthogonal_and_reaches_its_rows(rows, size, factors):
    blocks = RNG(1).standard_normal((factors, rows // size, size, size)).astype("float32")
    rotation = numpy(butterfly(blocks))
    mixed = size * 2 ** (factors - 1)
    assert rotation.shape == (rows // mixed, mixed, mixed)
    product = rotation @ rotation.transpose(0, 2, 1)
    np.testing.assert_allclose(product, [np.eye(mixed)] * len(product), atol=1e-5)
    # Every row is mixed with every other one of its group, although each factor is sparse.
    assert (np.abs(rotation) > 1e-7).all()


def test_butterfly_factors_are_those_of_the_paper():
    """Factor i couples halves of blocks that lie 2^i halves apart."""
    blocks = np.zeros((3, 8, 2, 2), "float32")
    blocks[2] = [[0, 1.0], [-1.0, 0]]
    rotation = numpy(butterfly(blocks))
    assert rotation.shape == (2, 8, 8)
    coupled = np.abs(rotation[0]) > 1e-6
    for row in range(8):
        assert set(np.flatnonzero(coupled[row])) <= {row, row ^ 4}
    assert coupled[0, 4]


@pytest.mark.parametrize("options", [{}, {"cayley_neumann": False}, {"block_share": True}])
def test_oft_keeps_lengths_of_columns(options):
    base = randomize(sequential(keras.layers.Dense(6, name="site"), shape=(64,)))
    model = lora.convert_to_lora_model(
        base, lora_method="oft", lora_targets="site", lora_options={"block_size": 8, **options}
    )
    randomize(model, 2, only=is_lora_weight)
    (layer,) = lora.lora_layers(model)
    assert tuple(layer.lora_weights[0].shape) == (1 if "block_share" in options else 8, 28)
    before = np.linalg.norm(numpy(layer.kernel), axis=0)
    after = np.linalg.norm(numpy(layer.adapted_kernel()), axis=0)
    # The series is a rotation only approximately.
    tolerance = 1e-5 if options.get("cayley_neumann") is False else 0.2
    np.testing.assert_allclose(after, before, rtol=tolerance)
    assert np.abs(numpy(layer.adapted_kernel()) - numpy(layer.kernel)).max() > 0.05


def test_oft_sizes():
    base = tiny_model("vit")
    for options, shape in (
        ({}, (1, 496)),
        ({"blocks": 4}, (4, 28)),
        ({"block_size": 5}, (8, 6)),
        ({"blocks": 4, "block_share": True}, (1, 28)),
    ):
        model = lora.convert_to_lora_model(
            base,
            lora_method="oft",
            lora_targets="attn.qkv",
            lora_options=options,
            lora_train_classifier=False,
        )
        assert {tuple(v.shape) for v in model.trainable_weights} == {shape}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("oft", {"block_size": 4, "blocks": 8}, "Use one of them"),
        ("oft", {"block_size": 0}, "at least 1"),
        ("oft", {"block_sise": 4}, "block_size"),
        ("oft", {"block_size": 1}, "cannot be rotated"),
        ("boft", {"blocks": 2.5}, "at least 1"),
        ("boft", {"block_size": 4, "n_butterfly_factor": 5}, "lower n_butterfly_factor"),
        ("ia3", {"feedforward": 3}, "names of layers"),
        ("ia3", {"feedforward": "fc3"}, "matches none of the adapted layers"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(
            tiny_model("vit"), lora_method=method, lora_targets="attn.qkv", lora_options=options
        )


@pytest.mark.parametrize("method", ["ia3", "oft", "boft"])
@pytest.mark.parametrize("fields", [{"lora_dropout": 0.1}, {"lora_init": "gaussian"}])
def test_what_they_do_not_take(method, fields):
    with pytest.raises(ValueError, match=f"Leave {next(iter(fields))} out"):
        lora.convert_to_lora_model(tiny_model("vit"), lora_method=method, **fields)


def test_ia3_scales_outputs_with_their_bias_or_inputs():
    base = randomize(sequential(keras.layers.Dense(4, name="site"), shape=(3,)))
    x = RNG(3).standard_normal((5, 3)).astype("float32")
    kernel, bias = (numpy(v) for v in base.layers[-1].weights)
    for inner in (False, True):
        model = lora.convert_to_lora_model(
            base, lora_method="ia3", lora_targets="site",
            lora_options={"feedforward": ("site",) if inner else ()},
        )  # fmt: skip
        gain = 1 + RNG(4).standard_normal(3 if inner else 4).astype("float32")
        lora.lora_layers(model)[0].lora_weights[0].assign(gain)
        expected = (x * gain) @ kernel + bias if inner else (x @ kernel + bias) * gain
        assert relative_error(model(x), expected) <= 1e-6
        regular = lora.convert_to_regular_model(model)
        assert relative_error(regular(x), expected) <= 1e-6


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["groups", "depthwise", "einsum"])
def test_ia3_on_other_layers_is_a_gain_around_the_layer(kind, inner):
    layer, shape = {
        "groups": (keras.layers.Conv2D(8, 3, groups=2, strides=2, name="site"), (9, 8, 6)),
        "depthwise": (
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="site"),
            (7, 6, 4),
        ),
        # The bias has its axes in the order of the outputs, the gains in that of the kernel.
        "einsum": (
            keras.layers.EinsumDense("abc,ced->abde", (None, 3, 2), bias_axes="de", name="site"),
            (5, 4),
        ),
    }[kind]
    base = randomize(sequential(layer, shape=shape))
    options = {"feedforward": ["site"] if inner else []}
    model = lora.convert_to_lora_model(
        base, lora_method="ia3", lora_targets="site", lora_options=options
    )
    randomize(model, 5, only=is_lora_weight)
    gain = numpy(lora.lora_layers(model)[0].lora_weights[0])
    x = RNG(6).standard_normal((2, *shape)).astype("float32")
    if inner:
        expected = numpy(base(x * gain))
    else:
        around = gain.reshape(2, 3).T if kind == "einsum" else gain
        expected = numpy(base(x)) * around
    assert relative_error(model(x), expected) <= 1e-5
    lora.merge_lora_weights(model)
    assert relative_error(model(x), expected) <= 1e-5


def test_ia3_refuses_a_bias_that_is_shared_by_outputs():
    layer = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e", name="site")
    with pytest.raises(ValueError, match="not one value for each output"):
        lora.convert_to_lora_model(sequential(layer, shape=(5, 4)), lora_method="ia3")


def test_ia3_refuses_inputs_of_a_slice():
    with pytest.raises(ValueError, match="Adapt the whole layer"):
        lora.convert_to_lora_model(
            tiny_model("vit"), lora_method="ia3", lora_targets="attn.q attn.v",
            lora_options={"feedforward": "attn.qkv"},
        )  # fmt: skip


def test_ia3_adapters_multiply():
    base = tiny_model("vit")
    options = {
        "lora_method": "ia3",
        "lora_targets": "attn.qkv mlp.fc2",
        "lora_train_classifier": False,
    }
    options["lora_options"] = {"feedforward": "mlp.fc2"}
    model = lora.convert_to_lora_model(base, **options)
    lora.add_adapter(model, "second", **options)
    randomize(model, 7, only=is_lora_weight)
    product = lora.convert_to_lora_model(base, **options)
    found = values(model)
    for path, value in values(product).items():
        if path.endswith("ia3_l"):
            variable = next(v for v in product.trainable_weights if v.path.endswith(path))
            variable.assign(value * found[path] * found[f"{path}.second"])
    lora.set_adapter(model, ["default", "second"])
    x = images(model)
    assert relative_error(model(x), product(x)) <= 1e-5
    lora.merge_lora_weights(model)
    assert relative_error(model(x), product(x)) <= 1e-5


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_rotations_act_alone(method):
    model = lora.convert_to_lora_model(tiny_model("vit"), lora_method=method)
    lora.add_adapter(model, "second", lora_method=method, lora_train_classifier=False)
    with pytest.raises(ValueError, match="cannot act together"):
        lora.set_adapter(model, ["default", "second"])


def test_feedforward_of_peft():
    """A list has ends of paths that need not begin at a dot, a text is a regular expression."""
    modules = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    for found, expected in (
        (["c2"], [False, True, True]),
        (["1.mlp.fc2", "fc1"], [True, False, True]),
        (r"blocks\.0\..*", [True, True, False]),
        ([], [False, False, False]),
        (None, [False, False, False]),
    ):
        options = IA3.fields_from_peft({"feedforward_modules": found})["lora_options"]
        by_layer = IA3.options_by_layer(options, modules)
        assert [by_layer[m]["feedforward"] for m in modules] == expected


def test_counts():
    """Gains of qkv and fc2, blocks of 32 and of 4 rows of qkv."""
    base = tiny_model("vit", embed_dim=64, depth=3, seed=None)
    count = {}
    for method, options in (("ia3", {"feedforward": "mlp.fc2"}), ("oft", {}), ("boft", {})):
        targets = "attn.qkv mlp.fc2" if method == "ia3" else "attn.qkv"
        model = lora.convert_to_lora_model(
            base,
            lora_method=method,
            lora_targets=targets,
            lora_options=options,
            lora_train_classifier=False,
        )
        count[method] = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    assert count == {
        "ia3": 3 * (192 + 256),
        "oft": 3 * 2 * 32 * 31 // 2,
        "boft": 3 * (16 * 4 * 4 + 192),
    }
