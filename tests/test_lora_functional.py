"""LoRA on functional and Sequential models: keras.applications, attention, nested, shared."""

from __future__ import annotations

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
from tfimm_lora.weights.names import iterate_layers, named_variables, timm_path

L = keras.layers


def batch(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def modules(model: keras.Model) -> set[str]:
    return {timm_path(p) for p, la in iterate_layers(model) if getattr(la, "adapters", None)}


def check(base: keras.Model, x, tmp_path, expected: set[str] | None = None, **fields):
    """Everything that holds for the LoRA version of any model.

    The outputs have to move with the updates by more than a per cent, so that an adapted layer that
    the graph does not run through is seen.
    """
    before, outputs = values(base), numpy(base(x))
    tmp_path.mkdir(exist_ok=True)
    model = lora.convert_to_lora_model(base, **{"lora_rank": 2, "lora_alpha": 8, **fields})
    assert expected is None or modules(model) == expected
    assert keras.tree.map_structure(np.array_equal, numpy(model(x)), outputs)
    _same(numpy(model(x)), outputs)
    found = gradients(model, x)
    for v in named_variables(model):
        if "_lora_" in v.leaf:
            assert v.variable.trainable
            assert found[v.path] is not None, f"{v.path} has no part in the outputs"
            assert v.leaf.startswith("kernel_lora_a") or np.any(found[v.path]), v.path
        elif not fields:
            assert not v.variable.trainable, v.path
    randomize(model, 3, only="_lora_")
    adapted = numpy(model(x))
    assert relative_error(adapted, outputs) > 1e-2
    lora.merge_lora_weights(model)
    assert relative_error(model(x), adapted) <= 2e-5
    lora.unmerge_lora_weights(model)
    _same(numpy(model(x)), adapted)
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is type(base)
    assert relative_error(regular(x), adapted) <= 2e-5
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(values(loaded), values(model))
    _same(numpy(loaded(x)), adapted)
    assert {v.path for v in loaded.trainable_weights} == {v.path for v in model.trainable_weights}
    lora.save_adapter(model, tmp_path / "adapter")
    again = lora.load_adapter(base, tmp_path / "adapter")
    _same(numpy(again(x)), adapted)
    assert_same_bits(values(base), before)
    return model


def _same(found, expected) -> None:
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


def test_sequential(tmp_path):
    base = sequential(
        L.Conv2D(6, 3, padding="same", activation="relu", name="conv"),
        L.Flatten(name="flatten"),
        L.Dense(8, activation="relu", name="hidden"),
        L.Dense(3, name="top"),
        shape=(6, 6, 3),
    )
    randomize(base)
    check(base, batch(2, 6, 6, 3), tmp_path, {"conv", "hidden", "top"})
    model = lora.convert_to_lora_model(base, lora_targets=["hidden"], lora_train_classifier=True)
    assert {v.path.split("/")[-2] for v in model.trainable_weights} == {"hidden", "top"}


def test_only_the_targets(tmp_path):
    base = randomize(sequential(L.Dense(5, name="one"), L.Dense(4, name="two"), shape=(3,)))
    check(base, batch(2, 3), tmp_path, {"two"}, lora_targets="two")


def test_batch_norm_stands_still(tmp_path):
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(8, 3, name="conv")(inputs)
    x = L.BatchNormalization(name="bn")(x)
    x = L.GlobalAveragePooling2D(name="pool")(L.ReLU(name="relu")(x))
    base = randomize(keras.Model(inputs, L.Dense(3, name="top")(x)))
    model = check(base, batch(2, 6, 6, 3), tmp_path, {"conv", "top"})
    before = values(model)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batch(8, 6, 6, 3), np.arange(8) % 3, epochs=2, verbose=0)
    after = values(model)
    changed = {p for p in after if after[p].tobytes() != before[p].tobytes()}
    assert changed == {p for p in after if "_lora_" in p}


def test_attention_layers_inside(tmp_path):
    inputs = keras.Input((5, 12))
    x = L.MultiHeadAttention(2, 6, name="attention")(inputs, inputs)
    x = L.Add(name="add")([inputs, x])
    x = L.Flatten(name="flatten")(L.LayerNormalization(name="norm")(x))
    base = randomize(keras.Model(inputs, L.Dense(3, name="top")(x)))
    names = {f"attention.{n}" for n in ("query", "key", "value", "attention_output")}
    check(base, batch(2, 5, 12), tmp_path, names | {"top"})
    check(base, batch(2, 5, 12), tmp_path / "2", {"attention.query"},
          lora_targets=["attention.query"])  # fmt: skip


def test_a_zoo_model_as_a_layer(tmp_path):
    inputs = keras.Input((16, 16, 3))
    features = tiny_model(nb_classes=0, seed=None)(inputs)
    base = randomize(keras.Model(inputs, L.Dense(4, name="top")(features)))
    model = check(base, batch(2, 16, 16, 3), tmp_path, lora_targets=["*.attn.qkv", "top"])
    assert modules(model) == {"vit.blocks.0.attn.qkv", "vit.blocks.1.attn.qkv", "top"}


@pytest.mark.parametrize("inner", ["functional", "sequential"])
def test_models_inside_models(inner: str, tmp_path):
    if inner == "sequential":
        body = keras.Sequential([keras.Input((6,)), L.Dense(7, "gelu", name="one"),
                                 L.Dense(5, name="two")], name="body")  # fmt: skip
    else:
        x = keras.Input((6,))
        body = keras.Model(
            x, L.Dense(5, name="two")(L.Dense(7, "gelu", name="one")(x)), name="body"
        )
    inputs = keras.Input((6,))
    base = randomize(keras.Model(inputs, L.Dense(3, name="top")(body(inputs))))
    check(base, batch(4, 6), tmp_path, {"body.one", "body.two", "top"})


def test_shared_layers_share_their_update(tmp_path):
    shared = L.Dense(6, name="shared")
    inputs = keras.Input((6,))
    x = shared(L.Activation("tanh", name="act")(shared(inputs)))
    base = randomize(keras.Model(inputs, L.Dense(3, name="top")(x)))
    model = check(base, batch(4, 6), tmp_path, {"shared", "top"})
    assert len(lora.lora_layers(model)) == 2


def test_several_inputs_and_outputs_by_name(tmp_path):
    left, right = keras.Input((4,), name="left"), keras.Input((6,), name="right")
    x = L.Concatenate(name="join")([L.Dense(5, name="a")(left), L.Dense(5, name="b")(right)])
    base = keras.Model({"left": left, "right": right}, L.Dense(3, name="top")(x))
    randomize(base)
    inputs = {"left": batch(4, 4), "right": batch(4, 6, seed=1)}
    check(base, inputs, tmp_path, {"a", "b", "top"})
    many = keras.Model({"left": left, "right": right}, {"one": x, "two": L.Dense(2, name="t")(x)})
    randomize(many)
    model = lora.convert_to_lora_model(many)
    assert set(model(inputs)) == {"one", "two"}
    _same(numpy(model(inputs)), numpy(many(inputs)))


def test_list_inputs(tmp_path):
    left, right = keras.Input((4,)), keras.Input((4,))
    base = keras.Model(
        [left, right], L.Dense(3, name="top")(L.Subtract(name="minus")([left, right]))
    )
    randomize(base)
    check(base, [batch(4, 4), batch(4, 4, seed=1)], tmp_path, {"top"})


@pytest.mark.parametrize("name", ["MobileNetV2", "ConvNeXtTiny"])
def test_keras_applications(name: str, tmp_path):
    if name == "MobileNetV2":
        base = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
        targets, wanted = ["block_1_*", "predictions"], "block_1_depthwise"
    else:
        if keras.backend.backend() == "jax":
            pytest.skip("keras.applications.ConvNeXt takes minutes to build under JAX")
        from keras.src.applications.convnext import ConvNeXt

        base = ConvNeXt([1, 1, 1, 1], [8, 16, 24, 32], input_shape=(32, 32, 3), weights=None,
                        classes=5, include_preprocessing=False, name="small")  # fmt: skip
        targets, wanted = ["*pointwise*"], "pointwise_conv.1"
    randomize(base)
    # A softmax of logits in the tens is constant; the logits are what can be compared.
    base.layers[-1].activation = keras.activations.linear
    model = check(base, batch(2, 32, 32, 3), tmp_path, lora_targets=targets)
    assert any(wanted in m for m in modules(model))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_keras_hub_backbones(kind: str, tmp_path):
    hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    if kind == "vit":
        base = hub.models.ViTBackbone(
            image_shape=(16, 16, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=16,
            mlp_dim=32,
        )  # fmt: skip
    else:
        base = hub.models.BertBackbone(
            vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
            max_sequence_length=6,
        )  # fmt: skip
    randomize(base)
    if kind == "vit":
        x = batch(2, 16, 16, 3)
        assert type(base).__name__ == "ViTBackbone"
    else:
        tokens = np.arange(12).reshape(2, 6)
        x = {"token_ids": tokens, "segment_ids": tokens * 0, "padding_mask": tokens * 0 + 1}
    model = lora.convert_to_lora_model(base, lora_rank=2, lora_alpha=8)
    _same(numpy(model(x)), numpy(base(x)))
    einsum = [la for la in lora.lora_layers(model) if isinstance(la, lora.LoRAEinsumDense)]
    assert len(einsum) >= 4
    randomize(model, 3, only="_lora_")
    first = numpy(keras.tree.flatten(model(x))[0])
    assert relative_error(first, numpy(keras.tree.flatten(base(x))[0])) > 1e-2
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is type(base)
    assert relative_error(keras.tree.flatten(regular(x))[0], first) <= 2e-5
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    _same(numpy(keras.tree.flatten(loaded(x))[0]), first)


def test_compiled_models_lose_only_their_optimizer(tmp_path):
    base = randomize(sequential(L.Dense(3, name="top"), shape=(4,)))
    base.compile("sgd", "mse")
    model = lora.convert_to_lora_model(base, lora_rank=2)
    model.compile("adam", "mse")
    model.fit(batch(4, 4), batch(4, 3), verbose=0)
    model.save(tmp_path / "m.keras")
    assert keras.saving.load_model(tmp_path / "m.keras").optimizer.iterations == 1


def test_hand_made_models_with_lora_layers():
    """The lists work for any model with LoRA layers, however it was made."""
    model = sequential(lora.LoRADense(6, lora_rank=2, name="a"), L.Dense(3, name="b"), shape=(4,))
    assert [w.name for w in lora.lora_trainable_weights(model)] == [
        "kernel_lora_a",
        "kernel_lora_b",
    ]
    assert len(lora.lora_trainable_weights(model, train_bias="lora_only")) == 3
    assert len(lora.lora_trainable_weights(model, train_bias="all")) == 4
    assert len(lora.lora_trainable_weights(model, trainable_layers=["b"])) == 4
    assert len(lora.lora_non_trainable_weights(model)) == 4
    assert len(model.trainable_weights) == 4  # LoRA's factors, and the layer nobody froze
    lora.set_trainable(model)
    assert len(model.trainable_weights) == 2


def test_not_built_is_refused():
    with pytest.raises(ValueError, match=r"not built: give it an input \(keras.Input\), or call"):
        lora.convert_to_lora_model(keras.Sequential([L.Dense(3)]))


def test_groups_of_the_zoo_are_unknown_here():
    base = sequential(L.Dense(3, name="top"), shape=(4,))
    with pytest.raises(ValueError, match="'attention': this architecture has no such group"):
        lora.convert_to_lora_model(base, lora_targets="attention")


def test_the_classifier_cannot_be_both():
    base = sequential(L.Dense(4, name="a"), L.Dense(3, name="top"), shape=(4,))
    with pytest.raises(
        ValueError, match=r"'top' is targeted .* and trained in full .*one of the two"
    ):
        lora.convert_to_lora_model(base, lora_targets=["a", "top"], lora_train_classifier=True)
