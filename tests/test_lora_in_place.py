"""Methods that train weights of the model itself: LN tuning, BitFit, linear probe, full."""

from __future__ import annotations

import json
import warnings

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    gradients,
    images,
    numpy,
    randomize,
    sequential,
    tiny_lora_model,
    tiny_model,
    trained,
    values,
)
from tfimm_lora import lora
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.weights.names import named_variables

METHODS_IN_PLACE = [name for name, method in METHODS.items() if method.in_place]
each_method = pytest.mark.parametrize("method", METHODS_IN_PLACE)
KINDS = ["vit", "convnext", "sequential", "functional"]
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:PEFT has no method")


def base_model(kind: str) -> keras.Model:
    """A regular model with random weights; the last two have batch normalisation."""
    if kind in ("vit", "convnext"):
        return tiny_model(kind)
    L = keras.layers
    layers = [
        L.Conv2D(6, 3, name="conv"),
        L.BatchNormalization(name="bn"),
        L.GlobalAveragePooling2D(name="pool"),
        L.LayerNormalization(name="ln"),
        L.Dense(4, name="head"),
    ]
    if kind == "sequential":
        return randomize(sequential(*layers, shape=(8, 8, 3)))
    x = inputs = keras.Input((8, 8, 3))
    for layer in layers:
        x = layer(x)
    return randomize(keras.Model(inputs, x, name="net"))


def batch(model: keras.Model, size: int = 4) -> np.ndarray:
    if hasattr(model, "cfg"):
        return images(model, size)
    return np.random.default_rng(1).standard_normal((size, 8, 8, 3)).astype("float32")


def fitted(model: keras.Model) -> keras.Model:
    """The model after two steps of ``fit`` that change what is trained."""
    x = batch(model)
    y = np.arange(len(x)) % 4
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss=loss)
    model.fit(x, y, epochs=2, batch_size=len(x), verbose=0)
    return model


def expected_names(model: keras.Model, method: str) -> set[str]:
    """Names of what is trained, from the names alone."""
    variables = [
        v for v in named_variables(model) if v.leaf not in ("moving_mean", "moving_variance")
    ]
    if method == "full":
        return {v.name for v in variables}
    if method == "bitfit":
        return {v.name for v in variables if v.name.endswith(".bias")}
    if method == "linear_probe":
        classifier = (
            "head.fc." if any(v.name.startswith("head.fc.") for v in variables) else "head."
        )
        return {v.name for v in variables if v.name.startswith(classifier)}
    return {v.name for v in variables if "norm" in type(v.layer).__name__.lower()}


@each_method
@each_kind
def test_what_is_trained(kind, method):
    base = base_model(kind)
    fields = {} if method == "linear_probe" else {"lora_train_classifier": False}
    model = lora.convert_to_lora_model(base, lora_method=method, **fields)
    assert not lora.lora_layers(model)
    x = batch(base)
    np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    assert trained(model) == expected_names(model, method)
    ids = {id(w) for w in model.trainable_weights}
    names = {v.name for v in named_variables(model) if id(v.variable) in ids}
    assert names == expected_names(model, method)
    found = gradients(model, x, training=True)
    # A bias in front of a softmax or a normalisation may have none, but most weights have.
    assert sum(g is not None and np.any(g) for g in found.values()) >= 2
    lora.set_trainable(model)
    assert trained(model) == expected_names(model, method)


@each_method
@each_kind
def test_fit_changes_what_is_trained_and_nothing_else(kind, method):
    model = lora.convert_to_lora_model(base_model(kind), lora_method=method)
    before, wanted = values(model), trained(model)
    fitted(model)
    after = values(model)
    moves = {v.path: v for v in named_variables(model)}
    changed = {moves[p].name for p in before if before[p].tobytes() != after[p].tobytes()}
    statistics = {v.name for v in moves.values() if v.leaf.startswith("moving_")}
    assert changed - statistics <= wanted
    assert len(changed & wanted) >= 2
    # Moving statistics move where their layer is trained.
    assert bool(changed & statistics) == (bool(statistics) and method != "linear_probe")


@each_method
@each_kind
def test_saved_and_loaded_again(kind, method, tmp_path):
    base = base_model(kind)
    model = fitted(lora.convert_to_lora_model(base, lora_method=method))
    x, weights = batch(base), values(model)
    outputs = numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert_same_bits(values(loaded), weights)
    assert trained(loaded) == trained(model)

    lora.save_adapter(model, tmp_path / "adapter")
    again = lora.load_adapter(base, tmp_path / "adapter")
    assert_same_bits(values(again), weights)
    np.testing.assert_array_equal(numpy(again(x)), outputs)
    assert trained(again) == trained(model)
    other = lora.convert_to_lora_model(base, lora_method=method)
    assert lora.load_adapter(other, tmp_path / "adapter") is other
    assert_same_bits(values(other), weights)

    regular = lora.convert_to_regular_model(loaded)
    assert type(regular) is type(base)
    np.testing.assert_array_equal(numpy(regular(x)), outputs)
    assert len(regular.trainable_weights) == len(base.trainable_weights)


@each_method
@each_kind
def test_merging_is_nothing(kind, method):
    """The trained weights are the model's own: merged and unmerged are the same model."""
    model = lora.convert_to_lora_model(base_model(kind), lora_method=method)
    weights = values(model)
    lora.merge_lora_weights(model)
    lora.merge_lora_weights(model)
    fitted(model)
    lora.unmerge_lora_weights(model)
    assert values(model).keys() == weights.keys()


@pytest.mark.parametrize("method", [m for m in METHODS_IN_PLACE if METHODS[m].keeps_base])
@each_kind
def test_disabled_adapter_is_the_base_model(kind, method):
    base = base_model(kind)
    model = fitted(lora.convert_to_lora_model(base, lora_method=method))
    x, weights = batch(base), values(model)
    with lora.disable_adapters(model):
        np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    assert_same_bits(values(model), weights)
    lora.add_adapter(model, "other", lora_method="lora", lora_train_classifier=False)
    lora.set_adapter(model, "other")
    np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    lora.set_adapter(model, "default")
    assert_same_bits({k: v for k, v in values(model).items() if k in weights}, weights)


def test_full_keeps_no_base_to_go_back_to():
    model = lora.convert_to_lora_model(tiny_model("vit"), lora_method="full")
    with pytest.raises(ValueError, match="full"), lora.disable_adapters(model):
        pass


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@each_method
def test_create_model(kind, method):
    model = tiny_lora_model(kind, seed=None, lora_method=method)
    assert trained(model) >= expected_names(model, method)
    again = type(model).from_config(model.get_config())
    assert again.get_config() == model.get_config()


def test_printed_counts(capsys):
    """ViT of width 32, depth 2 and 10 classes; the figures are counted by hand."""
    base = tiny_model("vit")
    for method in METHODS_IN_PLACE:
        fields = {} if method == "linear_probe" else {"lora_train_classifier": False}
        lora.print_trainable_parameters(
            lora.convert_to_lora_model(base, lora_method=method, **fields)
        )
    printed = capsys.readouterr().out.splitlines()
    norms = (2 * 2 + 1) * 2 * 32
    biases = 32 + 2 * (96 + 32 + 128 + 32) + (2 * 2 + 1) * 32 + 10
    total = sum(int(np.prod(v.shape)) for v in base.weights)
    found = {m: line.split(" || ")[0] for m, line in zip(METHODS_IN_PLACE, printed, strict=True)}
    assert found == {
        "ln_tuning": f"trainable params: {norms:,}",
        "bitfit": f"trainable params: {biases:,}",
        "linear_probe": f"trainable params: {32 * 10 + 10:,}",
        "full": f"trainable params: {total:,}",
    }


def test_ln_tuning_of_some_layers():
    base = tiny_model("vit")
    model = lora.convert_to_lora_model(
        base, lora_method="ln_tuning", lora_targets="norm1", lora_train_classifier=False
    )
    assert trained(model) == {f"blocks.{i}.norm1.{w}" for i in (0, 1) for w in ("weight", "bias")}
    model = lora.convert_to_lora_model(
        base,
        lora_method="ln_tuning",
        lora_targets=["blocks.1.*", "norm"],
        lora_train_classifier=False,
    )
    assert {n.rpartition(".")[0] for n in trained(model)} == {
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    }


@pytest.mark.parametrize("kind", ["vit", "sequential"])
def test_ln_tuning_of_nothing(kind):
    for target in ("mlp.fc1", "norm7"):
        with pytest.raises(ValueError, match=f"{target!r} matches no normalisation layer"):
            lora.convert_to_lora_model(
                base_model(kind), lora_method="ln_tuning", lora_targets=target
            )
    plain = sequential(keras.layers.Dense(3), shape=(4,))
    with pytest.raises(ValueError, match="has no normalisation layers"):
        lora.convert_to_lora_model(plain, lora_method="ln_tuning")


def test_linear_probe_needs_a_classifier():
    with pytest.raises(ValueError, match="nb_classes of at least 1"):
        lora.convert_to_lora_model(tiny_model("vit", nb_classes=0), lora_method="linear_probe")
    with pytest.raises(ValueError, match="Leave lora_train_classifier out"):
        tiny_lora_model("vit", lora_method="linear_probe", lora_train_classifier=False)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("bitfit", {"lora_targets": "mlp.fc1"}, "Leave lora_targets out"),
        ("full", {"lora_targets": "mlp.fc1"}, "Leave lora_targets out"),
        ("linear_probe", {"lora_targets": "head"}, "Leave lora_targets out"),
        ("bitfit", {"lora_dropout": 0.1}, "Leave lora_dropout out"),
        ("ln_tuning", {"lora_init": "pissa"}, "Leave lora_init out"),
        ("full", {"lora_options": {"bias": True}}, "it takes none"),
    ],
)
def test_fields_without_meaning(method, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_lora_model("vit", lora_method=method, **fields)


@each_method
def test_adapter_file(method, tmp_path):
    model = lora.convert_to_lora_model(tiny_model("vit"), lora_method=method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    foreign = METHODS[method].peft_type is None
    assert any("only tfimm_lora reads" in str(w.message) for w in caught) == foreign
    if foreign:
        assert (config["peft_type"], config["method"]) == ("TFIMM_LORA", method)
    else:
        assert config["peft_type"] == "LN_TUNING"
        assert config["target_modules"] == "|".join(
            [rf"blocks\.{i}\.norm{j}" for i in (0, 1) for j in (1, 2)] + ["norm"]
        )


def test_adapter_of_another_method_is_refused(tmp_path):
    base = tiny_model("vit")
    lora.save_adapter(lora.convert_to_lora_model(base, lora_method="bitfit"), tmp_path)
    model = lora.convert_to_lora_model(base, lora_method="linear_probe")
    weights = values(model)
    with pytest.raises(ValueError, match=r"bitfit.*linear_probe"):
        lora.load_adapter(model, tmp_path)
    assert_same_bits(values(model), weights)
