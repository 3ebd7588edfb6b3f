"""First values of the factors: what they are, that step 0 is the base model, and EVA."""

from __future__ import annotations

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
from tfimm_lora.lora.first_updates import initialize_adapters
from tfimm_lora.lora.methods.initialization import INITIALIZATIONS, family

RANK, ALPHA = 4, 6.0
L = keras.layers
# A layer, and the shape of its inputs; the kernel is one matrix from inputs to outputs.
LAYERS = {
    "dense": (lambda: L.Dense(10, name="site"), (5, 12)),
    "convolution": (lambda: L.Conv2D(10, 3, strides=2, padding="same", name="site"), (9, 8, 6)),
    "dilated": (lambda: L.Conv2D(10, (3, 2), dilation_rate=2, name="site"), (9, 8, 6)),
    "einsum": (lambda: L.EinsumDense("abcd,cde->abe", (None, 10), name="site"), (5, 3, 4)),
}
OF_KERNEL = ["pissa", "pissa_niter_3", "olora"]
each_layer = pytest.mark.parametrize("kind", LAYERS)


def base_of(kind: str) -> keras.Model:
    create, shape = LAYERS[kind]
    return randomize(sequential(create(), shape=shape))


def inputs_of(kind: str, size: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((size, *LAYERS[kind][1])).astype("float32")


def adapted(base: keras.Model, init: str | None, **fields) -> keras.Model:
    fields = {"lora_targets": "site", "lora_rank": RANK, "lora_alpha": ALPHA, **fields}
    return lora.convert_to_lora_model(base, lora_init=init, **fields)


def factors(model: keras.Model) -> dict[str, np.ndarray]:
    """The variables of the only adapted layer, and matrices of their products."""
    (layer,) = lora.lora_layers(model)
    found = {v.name: numpy(v) for v in layer.lora_weights}
    for end in ("", "0"):
        if f"kernel_lora_a{end}" in found:
            a, b = found[f"kernel_lora_a{end}"], found[f"kernel_lora_b{end}"]
            found[f"product{end}"] = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
    kernel = numpy(layer.kernel)
    found["kernel"] = kernel.reshape(found["product"].shape)
    found["scaling"] = layer.scaling
    return found


def test_names():
    assert family("pissa_niter_16") == "pissa_niter_N" and family("pissa") == "pissa"
    base = base_of("dense")
    for name in ("pissa_niter_0", "pissa_niter_N", "pissa_niter_1e9", "pissa_niter_", "pisa"):
        with pytest.raises(ValueError, match=r"Unknown lora_init.*pissa_niter_N"):
            adapted(base, name)
    with pytest.raises(ValueError, match="Unknown lora_init 'pisa'"):
        lora.LoRADense(3, lora_init="pisa").build((None, 4))


@each_layer
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("init", [*OF_KERNEL, "orthogonal"])
def test_step_zero_is_the_base_but_for_rounding(init, method, kind):
    base, x = base_of(kind), inputs_of(kind)
    model = adapted(base, init, lora_method=method)
    assert relative_error(model(x), base(x)) <= 2e-6
    assert relative_error(model(x, training=True), base(x)) <= 2e-6
    # The frozen kernel is never rewritten.
    kernel = values(base)["site/kernel"]
    assert values(model)["site/kernel"].tobytes() == kernel.tobytes()
    with lora.disable_adapters(model):
        np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    names = {v.name for v in model.trainable_weights}
    assert names == {"kernel_lora_a", "kernel_lora_b"}


@each_layer
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_pissa_takes_the_largest_singular_values(kind, method):
    found = factors(adapted(base_of(kind), "pissa", lora_method=method))
    left, singular, right = np.linalg.svd(found["kernel"].astype("float64"), full_matrices=False)
    best = (left[:, :RANK] * singular[:RANK]) @ right[:RANK]
    np.testing.assert_allclose(found["scaling"] * found["product"], best, atol=2e-6)
    np.testing.assert_array_equal(found["product"], found["product0"])
    # Both factors have the same share of every singular value.
    a = found["kernel_lora_a"].reshape(-1, RANK)
    b = found["kernel_lora_b"].reshape(RANK, -1)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
    residual = found["kernel"] - found["scaling"] * found["product0"]
    assert np.linalg.svd(residual)[1][0] == pytest.approx(singular[RANK], rel=1e-4)


def test_fast_pissa_comes_near_and_is_reproducible():
    """A slowly falling spectrum; more iterations come nearer."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((96, 96)))[0] for _ in range(2))
    kernel = (left * np.linspace(1, 0.1, 96) ** 2) @ right
    base = sequential(L.Dense(96, name="site"), shape=(96,))
    base.layers[-1].kernel.assign(kernel)
    exact = factors(adapted(base, "pissa"))["product"]
    errors = []
    for init in ("pissa_niter_1", "pissa_niter_4", "pissa_niter_16"):
        found = factors(adapted(base, init))["product"]
        assert found.tobytes() == factors(adapted(base, init))["product"].tobytes()
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors[0] > errors[1] > errors[2]
    # What counts is how much of the kernel is taken: nearly as much as can be.
    left_over = [np.linalg.norm(kernel - 1.5 * factors(adapted(base, i))["product"])
                 for i in ("pissa", "pissa_niter_4")]  # fmt: skip
    assert left_over[0] <= left_over[1] <= 1.002 * left_over[0]


@each_layer
def test_olora_takes_the_first_columns_of_q(kind):
    found = factors(adapted(base_of(kind), "olora"))
    b = found["kernel_lora_b"].reshape(RANK, -1)
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)
    # What the first rows of R and columns of Q make: the projection of the kernel on them.
    np.testing.assert_allclose(found["product"], found["kernel"] @ b.T @ b, atol=1e-5)
    np.testing.assert_array_equal(found["product"], found["product0"])


@each_layer
def test_orthogonal_factors_cancel(kind):
    keras.utils.set_random_seed(3)
    found = factors(adapted(base_of(kind), "orthogonal"))
    for name in ("kernel_lora_a", "kernel_lora_b"):
        assert 0.02 < found[name].std() < 0.2
    assert np.abs(found["product"]).max() < 1e-7
    keras.utils.set_random_seed(3)
    again = factors(adapted(base_of(kind), "orthogonal"))
    assert again["kernel_lora_a"].tobytes() == found["kernel_lora_a"].tobytes()


@pytest.mark.parametrize("init", [*OF_KERNEL, "orthogonal"])
@pytest.mark.parametrize("kind", ["groups", "depthwise"])
def test_kernels_that_are_several_matrices(kind, init):
    layer = {
        "groups": L.Conv2D(8, 3, groups=2, name="site"),
        "depthwise": L.DepthwiseConv2D(3, name="site"),
    }[kind]
    with pytest.raises(ValueError, match="one matrix from inputs to outputs"):
        adapted(sequential(layer, shape=(9, 8, 6)), init)


def test_too_many_ranks():
    with pytest.raises(ValueError, match="12 x 10, has only 10 ranks"):
        adapted(base_of("dense"), "pissa", lora_rank=11)
    with pytest.raises(ValueError, match="even"):
        adapted(base_of("dense"), "orthogonal", lora_rank=3)


@pytest.mark.parametrize("init", OF_KERNEL)
def test_trained_factors_are_left_alone(init, tmp_path):
    """Saving, loading, and weights read into a new model."""
    base = tiny_model("vit")
    fields = {"lora_rank": 4, "lora_targets": ("attn.q", "attn.v", "mlp.fc2", "patch_embed.proj")}
    model = lora.convert_to_lora_model(base, lora_init=init, **fields)
    first = values(model)
    trained = {v.path.partition("/")[2] for v in model.trainable_weights if "_lora_" in v.path}
    leaves = {path.rpartition("/")[2] for path in trained}
    randomize(model, 2, only=lambda leaf: leaf in leaves)
    weights, x = values(model), images(model)
    assert any(weights[p].tobytes() != first[p].tobytes() for p in first)
    frozen = [p for p in first if "lora_a0" in p or "lora_b0" in p]
    assert len(frozen) == 2 * (2 * 3 + 1)
    assert_same_bits({p: weights[p] for p in frozen}, {p: first[p] for p in frozen})
    outputs = numpy(model(x))
    initialize_adapters(model)
    assert_same_bits(values(model), weights)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    assert_same_bits(values(keras.saving.load_model(tmp_path / "model.keras")), weights)
    again = lora.convert_to_lora_model(base, lora_init=init, **fields)
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same_bits(values(again), weights)
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = lora.load_adapter(base, tmp_path / "adapter")
    assert_same_bits(values(loaded), weights)
    np.testing.assert_array_equal(numpy(loaded(x)), outputs)
    lora.merge_lora_weights(model)
    assert relative_error(model(x), outputs) <= 1e-5
    lora.unmerge_lora_weights(model)
    assert_same_bits(values(model), weights)


def test_several_adapters_share_the_true_base():
    base = tiny_model("vit")
    x = images(base)
    model = lora.convert_to_lora_model(base, lora_init="pissa", lora_train_classifier=False)
    lora.add_adapter(model, "second", lora_init="olora", lora_train_classifier=False)
    assert relative_error(model(x), base(x)) <= 2e-6
    for name in ("second", ("default", "second")):
        lora.set_adapter(model, name)
        assert relative_error(model(x), base(x)) <= 4e-6
    assert not np.array_equal(
        *(values(model)[f"blocks_0/mlp/fc1/kernel_lora_a0{end}"] for end in ("", ".second"))
    )


# --- EVA -------------------------------------------------------------------------------------


def pca(rows: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Components, singular values and explained variance of rows, by NumPy."""
    centred = rows.astype("float64") - rows.astype("float64").mean(axis=0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    return right[:rank], singular[:rank], singular[:rank] ** 2 / (singular**2).sum()


def rows_of(kind: str, x: np.ndarray) -> np.ndarray:
    """What A reads, row by row, written with loops."""
    if kind == "dense":
        return x.reshape(-1, 12)
    if kind == "einsum":
        return x.reshape(-1, 12)
    if kind == "convolution":  # 9 x 8 in steps of 2, padded to 5 x 4 windows
        x = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
        return np.stack([
            x[:, i : i + 3, j : j + 3].reshape(len(x), -1)
            for i in range(0, 9, 2) for j in range(0, 8, 2)
        ], axis=1).reshape(-1, 54)  # fmt: skip
    return np.stack([
        x[:, i : i + 5 : 2, j : j + 3 : 2].reshape(len(x), -1)
        for i in range(5) for j in range(6)
    ], axis=1).reshape(-1, 36)  # fmt: skip


@each_layer
@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_pca_of_the_inputs(kind, whiten):
    base, x = base_of(kind), inputs_of(kind, 50)
    x = x * np.linspace(0.5, 2, x.shape[-1]) + 30  # a mean that float32 must not be lost on
    x = x.astype("float32")
    model = adapted(base, "eva")
    assert lora.initialize_eva(model, x, whiten=whiten) is model
    np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    found = factors(model)["kernel_lora_a"].reshape(-1, RANK).T
    components, singular, _ = pca(rows_of(kind, x), RANK)
    if whiten:
        components = components / np.sqrt(singular)[:, None]
    signs = np.sign((found * components).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, signs * components, atol=2e-3 * np.abs(components).max())
    assert not np.any(factors(model)["kernel_lora_b"])


def test_eva_takes_batches():
    base, x = base_of("dense"), inputs_of("dense", 50)
    whole, parts = adapted(base, "eva"), adapted(base, "eva")
    lora.initialize_eva(whole, x)
    lora.initialize_eva(parts, ((b, np.zeros(len(b))) for b in np.array_split(x, 7)))
    a = [factors(m)["kernel_lora_a"] for m in (whole, parts)]
    np.testing.assert_allclose(*a, atol=1e-5)


def eva_model(base: keras.Model, **fields) -> keras.Model:
    targets = ("attn.q", "attn.v", "mlp.fc1", "mlp.fc2")
    fields = {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": targets, **fields}
    return lora.convert_to_lora_model(base, lora_init="eva", **fields)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_eva_redistributes_ranks(method, tmp_path):
    base = tiny_model("vit")
    x = images(base, 40)
    before = eva_model(base, lora_method=method)
    model = lora.initialize_eva(before, x, rho=2.0)
    assert model is not before
    updates = [u for la in lora.lora_layers(model) for u in la.updates]
    old = [u for la in lora.lora_layers(before) for u in la.updates]
    ranks = [u.site.rank for u in updates]
    assert sum(ranks) == sum(u.site.rank for u in old) == 4 * 8
    assert len(set(ranks)) > 1 and max(ranks) <= 8
    for update in updates:
        assert update.scaling == pytest.approx(old[0].scaling)
        a = numpy(update.variables["kernel_lora_a"])
        np.testing.assert_allclose(a.T @ a, np.eye(len(a.T)), atol=1e-5)
    np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    # A layer's components are the first ones, however many there are.
    taken = []
    stop = lora.convert_to_lora_model(base, lora_init="eva", lora_rank=8, lora_targets="mlp.fc1")
    lora.initialize_eva(stop, x)
    for update, name in ((u, u.layer.path) for u in updates if u.layer.name == "fc1"):
        twin = next(la for la in lora.lora_layers(stop) if la.path == name)
        a = numpy(update.variables["kernel_lora_a"])
        np.testing.assert_allclose(numpy(twin.lora_weights[0])[:, : a.shape[1]], a, atol=1e-5)
        taken.append(a.shape[1])
    assert len(taken) == 2
    randomize(model, 1, only=lambda leaf: leaf.startswith("kernel_lora_b"))
    outputs = numpy(model(x))
    lora.save_adapter(model, tmp_path)
    np.testing.assert_array_equal(numpy(lora.load_adapter(base, tmp_path)(x)), outputs)


@pytest.mark.parametrize("problem", ["init", "rho", "images", "few", "trained", "groups", "two"])
def test_eva_with_bad_input(problem):
    base = tiny_model("vit")
    model, x, rho = eva_model(base), images(base, 8), 1.0
    message = {
        "init": "lora_init='pissa'",
        "rho": "at least 1",
        "images": "There are no images",
        "few": "too few",
        "trained": "is trained already",
        "groups": "not convolutions in groups",
        "two": "one adapter",
    }[problem]
    if problem == "init":
        model = lora.convert_to_lora_model(base, lora_init="pissa")
    if problem == "rho":
        rho = 0.5
    if problem == "images":
        x = []
    if problem == "few":
        model, x = eva_model(base, lora_rank=16), x[:1]
    if problem == "trained":
        randomize(model)
    if problem == "groups":
        model, x = eva_model(tiny_model("convnext"), lora_targets="conv_dw"), images(base, 1)
    if problem == "two":
        lora.add_adapter(model, "second", lora_train_classifier=False)
    weights = values(model)
    with pytest.raises(ValueError, match=message):
        lora.initialize_eva(model, x, rho=rho)
    assert_same_bits(values(model), weights)


def test_every_initialization_is_tested_here():
    elsewhere = {"loftq", "loftq_niter_N"}
    others = {"orthogonal", "eva", "gaussian", "kaiming_uniform"}
    assert {*map(family, OF_KERNEL)} | others | elsewhere == set(INITIALIZATIONS)


def test_uniform_and_gaussian_have_pefts_spread():
    base = sequential(L.Dense(8, name="site"), shape=(400,))
    uniform = factors(adapted(base, None))["kernel_lora_a"]
    assert np.abs(uniform).max() <= 1 / 20 and uniform.std() == pytest.approx(
        1 / 20 / 3**0.5, rel=0.05
    )
    gaussian = factors(adapted(base, "gaussian"))["kernel_lora_a"]
    assert gaussian.std() == pytest.approx(1 / RANK, rel=0.05)
