"""Many adapters in one batch: every example's answer is that of its adapter alone."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import images, numpy, randomize, tiny_lora_model
from tfimm_lora import lora
from tfimm_lora.lora.adapter_state import adapter_state
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.weights.names import is_lora_weight

# What a method needs beside its name, on models of width 32 (ViT) and 8 to 32 (ConvNeXt).
FIELDS: dict[str, dict[str, Any]] = {
    "boft": {"lora_options": {"block_size": 4}},
    "full": {},
    "ia3": {"lora_options": {"feedforward": ("mlp.fc2",)}},
    "oft": {"lora_options": {"block_size": 4}},
}
KERNEL_METHODS = [name for name, method in METHODS.items() if not method.in_place]


def add(model: Any, name: str, **fields: Any) -> None:
    """Adds an adapter, not active, whose updates are not zero."""
    adapter_state(model).add(model, name, LoRAConfig(**fields))
    seed = len(adapter_state(model).fields)
    randomize(model, seed, only=lambda leaf: is_lora_weight(leaf) and leaf.endswith(f".{name}"))


def activate(model: Any, name: str | None) -> None:
    adapter_state(model).activate(model, [] if name is None else [name])


def train(model: Any, name: str, seed: int) -> None:
    """Changes everything that an adapter trains, as training would."""
    activate(model, name)
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = generator.standard_normal(variable.shape) * 0.1
        variable.assign(numpy(variable) + noise.astype("float32"))


def alone(model: Any, x: Any) -> dict[str | None, np.ndarray]:
    """Outputs of each adapter alone, and of the base model."""
    found = {}
    for name in (None, *adapter_state(model).fields):
        activate(model, name)
        found[name] = numpy(model(x))
    return found


def check(model: Any, x: Any, atol: float = 1e-5) -> None:
    """Compares a batch of all adapters with each alone, which have to differ."""
    outputs = alone(model, x)
    names = list(outputs)
    for a in range(len(names)):
        for b in range(a):
            difference = np.abs(outputs[names[a]] - outputs[names[b]]).max()
            assert difference > 1e-3, (names[a], names[b])
    order = [names[i % len(names)] for i in range(len(x))]
    expected = np.stack([outputs[name][i] for i, name in enumerate(order)])
    ids = lora.adapter_ids(model, order)
    for active in (names[1], names[-1]):
        activate(model, active)
        np.testing.assert_allclose(numpy(model({"image": x, "adapter": ids})), expected, atol=atol)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("method", KERNEL_METHODS)
def test_two_adapters_of_a_method_and_a_lora(method: str, kind: str):
    fields = FIELDS.get(method, {})
    model = tiny_lora_model(kind, lora_rank=2, lora_train_classifier=False)
    targets = ("mlp.fc1", "mlp.fc2")
    add(model, "a", lora_method=method, lora_rank=2, lora_targets=targets, **fields)
    add(model, "b", lora_method=method, lora_rank=3, lora_targets=("mlp.fc2",), **fields)
    check(model, images(model, batch=5))


def test_all_methods_in_one_batch():
    model = tiny_lora_model(lora_rank=2, lora_train_classifier=False)
    for method in KERNEL_METHODS:
        if method != "lora":
            fields = {"lora_targets": ("mlp.fc1", "mlp.fc2"), **FIELDS.get(method, {})}
            add(model, method, lora_method=method, lora_rank=2, **fields)
    check(model, images(model, batch=2 * len(KERNEL_METHODS)))


def test_ranks_targets_slices_and_patterns():
    model = tiny_lora_model(lora_rank=2, lora_targets=("attn.q", "attn.v"))
    add(model, "wide", lora_rank=7, lora_targets="all", lora_alpha=3.0)
    add(model, "one", lora_rank=1, lora_targets=("blocks.1.attn.k",))
    add(model, "dora", lora_rank=3, lora_targets=("attn.v",), lora_method="dora")
    add(model, "gain", lora_targets=("attn.q",), lora_method="ia3")
    add(model, "pattern", lora_rank=2, lora_targets="mlp", lora_rank_pattern={"mlp.fc2": 5})
    check(model, images(model, batch=7))


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_classifiers_and_biases(kind: str, bias: str):
    fields = {"lora_train_classifier": True, "lora_train_bias": bias, "lora_rank": 2}
    model = tiny_lora_model(kind, **fields)
    add(model, "second", **fields)
    add(model, "adapted_head", lora_targets="mlp.fc1 head" if kind == "vit" else "mlp.fc1 head.fc")
    train(model, "second", 1)
    train(model, "default", 2)
    check(model, images(model, batch=5))


@pytest.mark.parametrize("method", ["ln_tuning", "bitfit", "linear_probe"])
@pytest.mark.parametrize("config", [{}, {"use_grn": True}], ids=["vit", "convnextv2"])
def test_methods_that_train_weights_of_the_model(method: str, config: dict[str, Any]):
    kind = "convnext" if config else "vit"
    model = tiny_lora_model(kind, lora_rank=2, lora_train_classifier=False, **config)
    add(model, "a", lora_method=method)
    add(model, "b", lora_method=method)
    train(model, "a", 1)
    train(model, "b", 2)
    check(model, images(model, batch=4))


def test_a_kernel_trained_in_full_beside_adapters_of_it():
    model = tiny_lora_model(lora_rank=2, lora_targets="mlp")
    add(model, "full", lora_targets=("attn.proj",), lora_modules_to_save=("blocks.0.mlp.fc1",))
    add(model, "dora", lora_targets="mlp", lora_method="dora", lora_train_bias="lora_only")
    train(model, "full", 1)
    train(model, "dora", 2)
    check(model, images(model, batch=4))


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "ia3", "oft"])
def test_convolutions_of_all_kinds(method: str):
    options = FIELDS.get(method, {}).get("lora_options", {})
    options = {} if method == "ia3" else options
    inputs = keras.Input((9, 9, 8))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="strided")(inputs)
    x = keras.layers.Conv2D(8, 3, dilation_rate=2, padding="same", name="dilated")(x)
    x = keras.layers.Conv2D(8, 1, strides=2, name="pointwise", activation="gelu")(x)
    x = keras.layers.Conv2D(8, 3, groups=2, padding="same", name="grouped")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    base = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    names = ["strided", "dilated", "pointwise"] if method == "oft" else "all"
    names = ["strided", "dilated", "pointwise", "grouped"] if method == "lora" else names
    model = lora.convert_to_lora_model(randomize(base), lora_rank=2, lora_targets="all")
    randomize(model, 3)
    add(model, "a", lora_method=method, lora_rank=2, lora_targets=names, lora_options=options)
    add(model, "b", lora_method=method, lora_rank=4, lora_targets=names, lora_options=options)
    x = np.random.default_rng(0).standard_normal((4, 9, 9, 8)).astype("float32")
    check(model, x)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft"])
def test_einsum_layers_and_the_plain_classifier_of_a_functional_model(method: str):
    options = FIELDS.get(method, {}).get("lora_options", {})
    inputs = keras.Input((5, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.EinsumDense("...x,xy->...y", 12, bias_axes="y", name="einsum")(x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    base = keras.Model(inputs, keras.layers.Dense(3, name="head")(x[:, 0]))
    fields = {"lora_targets": ("attention.*", "einsum"), "lora_train_classifier": True}
    model = lora.convert_to_lora_model(randomize(base), lora_rank=2, **fields)
    randomize(model, 3, only=is_lora_weight)
    add(model, "a", lora_method=method, lora_rank=2, lora_options=options, **fields)
    add(model, "b", lora_rank=3, lora_train_bias="all", **fields)
    train(model, "a", 1)
    train(model, "b", 2)
    x = np.random.default_rng(0).standard_normal((4, 5, 8)).astype("float32")
    check(model, x)


def test_a_layer_whose_input_is_the_same_for_all_images():
    model = tiny_lora_model(lora_rank=2, lora_targets=("attn_pool.q",), global_pool="map")
    add(model, "a", lora_rank=3, lora_targets=("attn_pool.q", "attn_pool.kv"))
    check(model, images(model, batch=4))


def two_adapters() -> Any:
    model = tiny_lora_model(lora_rank=2, lora_train_classifier=True)
    add(model, "a", lora_rank=3, lora_train_classifier=True)
    train(model, "a", 1)
    return model


@pytest.mark.parametrize("jit", [True, False])
def test_predict_and_evaluate_compile_once_for_any_mix(jit: bool, monkeypatch):
    model = two_adapters()
    x = images(model, batch=4)
    outputs = alone(model, x)
    traces = []
    forward = type(model).forward_features
    monkeypatch.setattr(
        type(model),
        "forward_features",
        lambda self, *args, **kwargs: traces.append(1) or forward(self, *args, **kwargs),
    )
    model.compile(loss="mse", jit_compile=jit)
    for names in (["a", None, "default", "a"], ["a"] * 4, [None, None, "default", "default"]):
        ids = lora.adapter_ids(model, names)
        expected = np.stack([outputs[name][i] for i, name in enumerate(names)])
        found = model.predict({"image": x, "adapter": ids}, verbose=0, batch_size=4)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # Without jit, Keras' predict on JAX is eager.
    eager = keras.backend.backend() == "jax" and not jit
    assert len(traces) == (3 if eager else 1)
    for ids in ([1, -1, 0, 1], [0, 0, 1, 1]):
        batch = {"image": x, "adapter": np.array(ids)}
        target = model.predict(batch, verbose=0, batch_size=4)
        assert model.evaluate(batch, target, verbose=0, batch_size=4) < 1e-9
        assert model.evaluate(batch, target + 1, verbose=0, batch_size=4) == pytest.approx(1)
    # One more for evaluate, and on JAX one to make the metrics.
    assert eager or len(traces) <= 3


def test_compiled_functions_follow_what_adapters_become():
    model = two_adapters()
    x = images(model, batch=3)
    model.compile(loss="mse")
    batch = {"image": x, "adapter": np.array([0, 1, -1])}
    activate(model, "default")
    model.predict(batch, verbose=0)
    plain = model.predict(x, verbose=0)
    # Values of an active adapter are variables, those of the others are constants.
    for name in ("default", "a"):
        train(model, name, 7)
        activate(model, "default")
        outputs = alone(model, x)
        activate(model, "default")
        expected = np.stack([outputs[n][i] for i, n in enumerate(("default", "a", None))])
        np.testing.assert_allclose(model.predict(batch, verbose=0), expected, atol=1e-5)
        np.testing.assert_allclose(model.predict(x, verbose=0), outputs["default"], atol=1e-5)
    assert np.abs(plain - outputs["default"]).max() > 1e-3
    add(model, "third", lora_rank=2)
    batch["adapter"] = np.array([2, 1, -1])
    outputs = alone(model, x)
    expected = np.stack([outputs[n][i] for i, n in enumerate(("third", "a", None))])
    np.testing.assert_allclose(model.predict(batch, verbose=0), expected, atol=1e-5)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = tiny_lora_model(lora_rank=2, lora_train_classifier=False)
    add(model, "a", lora_rank=3, lora_method="dora")
    add(model, "b", lora_rank=2, lora_method="lokr")
    check(model, images(model, batch=4), atol=0.1)


def test_a_wrong_id_never_gives_another_adapters_answer():
    model = two_adapters()
    x = images(model, batch=3)
    for wrong in (2, -2):
        batch = {"image": x, "adapter": np.array([0, wrong, 1])}
        for call in (model, model.predict, lambda b: model.evaluate(b, np.zeros((3, 10)))):
            with pytest.raises(ValueError, match=rf"no adapter {wrong}\..*2 \(default, a\)"):
                call(batch)
    # In a graph nothing can be raised: NaN in its row, and in no other.
    import tensorflow as tf

    model.compile(loss="mse")
    batch = {"image": x, "adapter": np.array([0, 2, 1])}
    data = tf.data.Dataset.from_tensor_slices(batch).batch(3)
    found = model.predict(data, verbose=0)
    assert np.isnan(found[1]).all()
    right = model.predict({"image": x, "adapter": np.array([0, 0, 1])}, verbose=0)
    np.testing.assert_allclose(found[[0, 2]], right[[0, 2]], atol=1e-6)


def test_an_adapter_that_is_not_finite_harms_no_other():
    model = two_adapters()
    x = images(model, batch=3)
    batch = {"image": x, "adapter": np.array([0, 1, -1])}
    right = numpy(model(batch))
    activate(model, "a")
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, np.nan))
    found = numpy(model(batch))
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], right[[0, 2]], atol=1e-6)


def test_errors_say_what_to_do():
    model = two_adapters()
    x, ids = images(model, batch=2), np.array([0, 1])
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match="Train the adapters one after the other"):
        model({"image": x, "adapter": ids}, training=True)
    with pytest.raises(ValueError, match="Train the adapters one after the other"):
        model.fit({"image": x, "adapter": ids}, np.zeros((2, 10)), verbose=0)
    with pytest.raises(ValueError, match="takes integers, found float32"):
        model.predict({"image": x, "adapter": np.array([0.0, 1.0], "float32")})
    with pytest.raises(ValueError, match=r"found \['adapter', 'images'\]"):
        model({"images": x, "adapter": ids})
    with pytest.raises(ValueError, match="one id an example"):
        model({"image": x, "adapter": ids.reshape(1, 2)})
    with pytest.raises(ValueError, match=r"no adapter 'aa'\. Did you mean 'a'"):
        lora.adapter_ids(model, ["aa"])
    with pytest.raises(ValueError, match="no LoRA model"):
        lora.adapter_ids(keras.Sequential(name="plain"), ["a"])
    lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="are merged, so examples cannot have adapters"):
        model({"image": x, "adapter": ids})


def test_weights_that_cannot_differ_are_named():
    model = tiny_lora_model("convnext", lora_rank=2, lora_train_classifier=False)
    batch = {"image": images(model, batch=2), "adapter": np.array([0, 1])}
    add(model, "block", lora_targets="head.fc", lora_modules_to_save=("stages.0.blocks.0",))
    model(batch)  # trained by nobody yet, so all have the same
    train(model, "block", 1)
    with pytest.raises(ValueError, match=r"'block' has a value .* stages\.0\.blocks\.0\.gamma"):
        model(batch)
    model = tiny_lora_model(lora_method="full")
    add(model, "a", lora_rank=2)
    with pytest.raises(ValueError, match=r"'default' trains .* no copy of the base model's"):
        model({"image": images(model, batch=2), "adapter": np.array([0, 1])})
