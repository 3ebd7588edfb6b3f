"""Several adapters in files: the same state, values and next step in another process."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    answer_of,
    numpy,
    randomize,
    trained,
)
from tests.several import (
    base_model,
    batch,
    each_kind,
    expected_outputs,
    first_model,
    same,
    without_peft_warnings,
)
from tfimm_lora import lora
from tfimm_lora.weights.names import is_lora_weight


@pytest.fixture(scope="module")
def outputs() -> Any:
    return expected_outputs()


# --- Files ------------------------------------------------------------------------------------

STATE = """
import json, sys
import keras, numpy as np
from tfimm_lora import lora

folder = sys.argv[1]
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
found = []
for weights in ("", folder + "/later.weights.h5"):
    model = keras.saving.load_model(folder + "/model.keras")
    if weights:
        lora.set_adapter(model, "c")
        model.load_weights(weights)
    for layer in lora.lora_layers(model):
        if "b" in layer.adapters:
            layer.adapters["b"].dropout = None
    found.append([lora.adapter_names(model), lora.active_adapters(model)])
    outputs = {"found": model(x)}
    model.fit(x, y, epochs=1, batch_size=len(x), verbose=0)
    outputs["step"] = model(x)
    for name in lora.adapter_names(model):
        lora.set_adapter(model, name)
        outputs[name] = model(x)
    with lora.disable_adapters(model):
        outputs["base"] = model(x)
    np.savez(folder + f"/outputs_{bool(weights)}.npz", **outputs)
print(json.dumps(found))
"""


@each_kind
def test_a_fresh_process_has_the_same_state_and_takes_the_same_step(kind, outputs, tmp_path):
    model = first_model(kind, "abcd")
    x = batch(model)
    y = np.random.default_rng(2).standard_normal(numpy(model(x)).shape).astype("float32")
    active = ("b", "a") if kind != "convnext" else ("a", "b")
    lora.set_adapter(model, active)
    # Dropout would be drawn anew, and a moment of Adam must not be lost.
    model.compile(keras.optimizers.Adam(0.01), "mse")
    for layer in lora.lora_layers(model):
        if "b" in layer.adapters:
            layer.adapters["b"].dropout = None
    model.fit(x, y, epochs=2, batch_size=len(x), verbose=0)
    tuned = numpy(model(x))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "later.weights.h5")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    singles = {}
    model.fit(x, y, epochs=1, batch_size=len(x), verbose=0)
    step = numpy(model(x))
    for name in "abcd":
        lora.set_adapter(model, name)
        singles[name] = numpy(model(x))
    found = answer_of(STATE, tmp_path)
    assert found == [[["a", "b", "c", "d"], list(active)]] * 2
    for file in ("outputs_False.npz", "outputs_True.npz"):
        with np.load(tmp_path / file) as got:
            np.testing.assert_array_equal(got["found"], tuned)
            np.testing.assert_array_equal(got["base"], outputs(kind, ()))
            for name, want in {"step": step, **singles}.items():
                np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@each_kind
def test_weights_file_restores_values_and_the_active_ones(kind, outputs, tmp_path):
    model = first_model(kind, "abc")
    lora.set_adapter(model, "b")
    model.save_weights(tmp_path / "m.weights.h5")
    other = first_model(kind, "abc")
    for name in "abc":
        lora.set_adapter(other, name)
        randomize(other, 77, only=lambda leaf: is_lora_weight(leaf))
    other.load_weights(tmp_path / "m.weights.h5")
    assert lora.active_adapters(other) == ("b",)
    assert trained(other) == trained(model)
    same(other, outputs(kind, ("b",)))
    for name in "ac":
        lora.set_adapter(other, name)
        same(other, outputs(kind, (name,)))
    with lora.disable_adapters(other):
        same(other, outputs(kind, ()))
    fewer = first_model(kind, "ab")
    with pytest.raises(ValueError, match="holds the adapters a, b, c, the model has a, b"):
        fewer.load_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_trained_weights_are_never_taken_for_base_ones(suffix, tmp_path):
    """create_model settles a model again after its file is read."""
    base = tfimm_lora.create_model("test_vit", nb_classes=3)
    randomize(base)
    model = lora.convert_to_lora_model(base, lora_train_classifier=True, lora_train_bias="all")
    randomize(model, 5, only=lambda leaf: leaf == "bias" or is_lora_weight(leaf))
    x = batch(model, 2)
    tuned, expected = numpy(model(x)), numpy(base(x))
    path = tmp_path / f"model{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    config = {"nb_classes": 3, "lora_train_classifier": True, "lora_train_bias": "all"}
    loaded = lora.create_model("test_vit", model_path=path, **config)
    np.testing.assert_array_equal(numpy(loaded(x)), tuned)
    with lora.disable_adapters(loaded):
        np.testing.assert_array_equal(numpy(loaded(x)), expected)
    if suffix == ".keras":  # another config: the weights are copied to another model
        other = lora.create_model("test_vit", model_path=path, **config, drop_path_rate=0.1)
        np.testing.assert_array_equal(numpy(other(x)), tuned)
        with lora.disable_adapters(other):
            np.testing.assert_array_equal(numpy(other(x)), expected)


def test_weights_of_a_method_in_place_alone(tmp_path, outputs):
    """A file without any low-rank factor is still that of a LoRA model."""
    model = first_model("vit", "d")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = first_model("vit", "d")
    randomize(loaded, 99, only="bias")
    loaded.load_weights(tmp_path / "m.weights.h5")
    same(loaded, outputs("vit", ("d",)))
    with lora.disable_adapters(loaded):
        same(loaded, outputs("vit", ()))
    base_model("vit").save_weights(tmp_path / "base.weights.h5")
    loaded.load_weights(tmp_path / "base.weights.h5")  # of a regular model: new base values
    same(loaded, outputs("vit", ()))
    with lora.disable_adapters(loaded):
        same(loaded, outputs("vit", ()))


def test_transferred_weights_are_the_new_base(outputs):
    model = first_model("vit", "a")
    other = randomize(base_model("vit"), 8)
    tfimm_lora.models.transfer_weights(other, model, lora.LORA_WEIGHT_NAMES)
    with lora.disable_adapters(model):
        same(model, numpy(other(batch(other))))
    source = first_model("vit", "a")
    tfimm_lora.models.transfer_weights(source, model)
    same(model, outputs("vit", ("a",)))
    with lora.disable_adapters(model):
        same(model, outputs("vit", ()))


@each_kind
def test_each_adapter_is_saved_and_loaded_by_itself(kind, outputs, tmp_path):
    model = first_model(kind, "abcd")
    lora.set_adapter(model, "b")
    with without_peft_warnings():
        for name in "abcd":
            lora.save_adapter(model, tmp_path / name, name)
        with lora.disable_adapters(model):
            lora.save_adapter(model, tmp_path / "again", "b")
    other = lora.load_adapter(base_model(kind), tmp_path / "a", "a")
    for name in "bcd":
        assert lora.load_adapter(other, tmp_path / name, name) is other
        assert lora.active_adapters(other) == ("a",)
    lora.load_adapter(other, tmp_path / "again" / "b", "e")
    assert lora.adapter_names(other) == ("a", "b", "c", "d", "e")
    same(other, outputs(kind, ("a",)))
    for name in "bcd":
        lora.set_adapter(other, name)
        # PEFT's magnitudes of DoRA are rounded sums.
        same(other, outputs(kind, (name,)), 1e-5)
    lora.set_adapter(other, "e")
    same(other, outputs(kind, ("b",)))
