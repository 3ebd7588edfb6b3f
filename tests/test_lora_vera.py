"""VeRA: projections that a whole model shares, drawn from a key."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_resumed,
    images,
    numpy,
    randomize,
    relative_error,
    sequential,
    tiny_lora_model,
    tiny_model,
    values,
)
from tfimm_lora import lora
from tfimm_lora.lora.methods.vera import VeRAProjections, draw_projections
from tfimm_lora.weights.names import iterate_layers

FIELDS: dict[str, Any] = {
    "lora_method": "vera",
    "lora_rank": 5,
    "lora_targets": ["attn.qkv", "mlp.fc2"],
    "lora_train_classifier": False,
}


def trained_part(leaf: str) -> bool:
    return leaf.startswith("vera_lambda")


def model_of(seed: int | None = 3, **fields: Any) -> keras.Model:
    model = tiny_lora_model("vit", seed=None, **{**FIELDS, **fields})
    return model if seed is None else randomize(model, seed, only=trained_part)


def projections(model: keras.Model) -> list[VeRAProjections]:
    return [la for _, la in iterate_layers(model) if isinstance(la, VeRAProjections)]


def test_projections_are_uniform_and_belong_to_the_key():
    a, b = draw_projections(4, 1000, 2000, 7)
    assert a.shape == (4, 1000) and b.shape == (2000, 4)
    for values_, fan_in in ((a, 1000), (b, 4)):
        bound = np.sqrt(6 / fan_in)
        assert np.abs(values_).max() <= bound
        assert values_.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert np.array_equal(draw_projections(4, 1000, 2000, 7)[1], b)
    assert not np.array_equal(draw_projections(4, 1000, 2000, 8)[0], a)
    with pytest.raises(ValueError):
        a[0, 0] = 1.0


def test_first_words_of_the_mersenne_twister():
    """The words of MT19937 for its reference seed, from its authors' output."""
    first = 3499211612, 581869302, 3890346734, 3586334585, 545404204
    uniform = [(word & 0xFFFFFF) / 2**24 for word in first]
    bound = np.sqrt(6 / 5)
    a, _ = draw_projections(1, 5, 1, 5489)
    np.testing.assert_allclose(a[0], (2 * np.array(uniform) - 1) * bound, rtol=1e-6)


def test_one_copy_for_the_whole_model():
    model = model_of()
    (held,) = projections(model)
    # The largest of 32 -> 96 (qkv) and 128 -> 32 (fc2).
    assert tuple(held.vera_projection_a.shape) == (5, 128)
    assert tuple(held.vera_projection_b.shape) == (96, 5)
    layers = lora.lora_layers(model)
    assert len(layers) == 4
    assert all(update.shared is held for layer in layers for update in layer.updates)
    names = {w.name for layer in layers for w in layer.lora_weights}
    assert names == {"vera_lambda_b", "vera_lambda_d"}
    count = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert count == 2 * (96 + 5) + 2 * (32 + 5)
    assert not held.trainable_weights


def test_the_equation():
    model = model_of(lora_options={"projection_prng_key": 11, "d_initial": 0.4})
    a, b = draw_projections(5, 128, 96, 11)
    for layer in lora.lora_layers(model):
        rows, columns = layer.kernel.shape
        d, out = numpy(layer.vera_lambda_d), numpy(layer.vera_lambda_b)
        delta = (out[:, None] * b[:columns]) @ (d[:, None] * a[:, :rows])
        expected = numpy(layer.kernel) + delta.T
        np.testing.assert_allclose(numpy(layer.adapted_kernel()), expected, rtol=1e-4, atol=1e-5)
    fresh = model_of(None, lora_options={"d_initial": 0.4})
    layer = lora.lora_layers(fresh)[0]
    assert np.all(numpy(layer.vera_lambda_d) == np.float32(0.4))
    assert not np.any(numpy(layer.vera_lambda_b))


def test_a_layer_alone_has_its_own():
    layer = lora.LoRADense(6, lora_method="vera", lora_rank=3)
    layer.build((None, 4))
    layer.vera_lambda_b.assign(np.ones(6))
    a, b = draw_projections(3, 4, 6, 0)
    x = np.random.default_rng(0).standard_normal((2, 4)).astype("float32")
    expected = x @ (numpy(layer.kernel) + (b @ (0.1 * a)).T)
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-4, atol=1e-5)
    assert {w.name for w in layer.weights} == {
        "kernel", "bias", "vera_lambda_b", "vera_lambda_d"
    }  # fmt: skip


def test_training_leaves_the_projections(tmp_path):
    model = model_of(None)
    (held,) = projections(model)
    before = [numpy(v) for v in held.variables]
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = images(model, 8), np.arange(8)
    history = model.fit(x, y, epochs=3, batch_size=4, verbose=0)
    assert len(set(history.history["loss"])) == 3
    assert all(np.array_equal(numpy(v), w) for v, w in zip(held.variables, before, strict=True))
    assert all(np.any(numpy(la.vera_lambda_b)) for la in lora.lora_layers(model))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        m.fit(x, y, epochs=1, batch_size=4, verbose=0, shuffle=False)
    assert_resumed(loaded.get_weights(), model.get_weights())


def test_functional_models():
    base = randomize(sequential(
        keras.layers.Conv2D(6, 3, name="conv"), keras.layers.Flatten(),
        keras.layers.Dense(4, name="dense"), shape=(5, 5, 2),
    ))  # fmt: skip
    model = lora.convert_to_lora_model(base, lora_method="vera", lora_rank=3)
    (held,) = projections(model)
    assert held.shape == (3, 54, 6)
    again = type(model).from_config(model.get_config())
    assert projections(again)[0].shape == held.shape
    randomize(model, 2, only=trained_part)
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 2)).astype("float32")
    regular = lora.convert_to_regular_model(model)
    assert relative_error(regular(x), model(x)) <= 1e-5
    assert relative_error(model(x), base(x)) > 1e-2


def test_several_adapters_have_projections_of_their_own():
    model = model_of()
    other = {**FIELDS, "lora_rank": 2, "lora_targets": ["mlp.fc1"],
             "lora_options": {"projection_prng_key": 9}}  # fmt: skip
    lora.add_adapter(model, "other", **other)
    first, second = projections(model)
    assert first.shape == (5, 128, 96) and second.shape == (2, 32, 128)
    x = images(model)
    outputs = numpy(model(x))
    lora.set_adapter(model, "other")
    randomize(model, 5, only=lambda leaf: leaf == "vera_lambda_b.other")
    assert relative_error(model(x), outputs) > 1e-2
    lora.set_adapter(model, "default")
    lora.delete_adapter(model, "other")
    assert projections(model) == [first]
    assert not [path for path in values(model) if "other" in path]
    assert np.array_equal(numpy(model(x)), outputs)


@pytest.mark.parametrize("kept", [True, False])
def test_adapter_file(kept: bool, tmp_path):
    options = {"projection_prng_key": 6, "save_projection": kept}
    base = tiny_model("vit")
    model = lora.convert_to_lora_model(base, **FIELDS, lora_options=options)
    randomize(model, 4, only=trained_part)
    folder = lora.save_adapter(model, tmp_path)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert (size > 4 * (5 * 128 + 96 * 5)) == kept
    loaded = lora.load_adapter(base, tmp_path)
    x = images(model)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))


def test_projections_of_a_file_count():
    """Whatever the key would give: another machine may have drawn other numbers."""
    import tempfile

    base = tiny_model("vit")
    model = lora.convert_to_lora_model(base, **FIELDS)
    randomize(model, 4, only=lambda leaf: leaf.startswith("vera"))
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(model, folder)
        loaded = lora.load_adapter(base, folder)
    x = images(model)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))


def test_different_ranks_cannot_be_saved_for_peft(tmp_path):
    model = model_of(lora_rank_pattern={"mlp.fc2": 3})
    assert projections(model)[0].shape == (5, 128, 96)
    with pytest.raises(ValueError, match="one rank for all layers"):
        lora.save_adapter(model, tmp_path)


@pytest.mark.parametrize("key", [-1, 1.5, True])
def test_bad_key(key: Any):
    with pytest.raises(ValueError, match="projection_prng_key"):
        lora.LoRAConfig(lora_method="vera", lora_options={"projection_prng_key": key})
