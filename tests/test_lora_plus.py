"""LoRA+: B learns with a learning rate of its own, with any optimizer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import assert_resumed, numpy, randomize, sequential
from tfimm_lora import lora
from tfimm_lora.weights.names import is_lora_weight

RATIO = 4.0


def model_of(ratio: float | None = RATIO, method: str = "lora", **fields: Any) -> keras.Model:
    base = sequential(
        keras.layers.Dense(6, name="first", activation="gelu"),
        keras.layers.Dense(3, name="last"),
        shape=(5,),
    )
    randomize(base)
    fields = {"lora_rank": 2, "lora_targets": ["first"], **fields}
    model = lora.convert_to_lora_model(
        base, lora_method=method, lora_plus_ratio=ratio, lora_train_classifier=True, **fields
    )
    return randomize(model, 1, only=is_lora_weight)


def step(model: keras.Model, optimizer: Any, count: int = 1) -> list[dict[str, np.ndarray]]:
    """Makes steps with random gradients; returns the weights before and the gradients."""
    model.compile(optimizer, "mse")
    variables = model.trainable_variables
    before = {v.path: numpy(v) for v in variables}
    rng = np.random.default_rng(2)
    found = [before]
    for _ in range(count):
        grads = {v.path: rng.standard_normal(v.shape).astype("float32") for v in variables}
        tensors = [keras.ops.convert_to_tensor(g) for g in grads.values()]
        optimizer.apply(tensors, variables)
        found.append(grads)
    return found


def ratio_of(path: str) -> float:
    return RATIO if path.endswith("kernel_lora_b") else 1.0


def assert_weights(model: keras.Model, expected: dict[str, np.ndarray]) -> None:
    assert {v.path for v in model.trainable_variables} == set(expected)
    assert sum(ratio_of(path) != 1 for path in expected) == 1 and len(expected) == 4
    for v in model.trainable_variables:
        np.testing.assert_allclose(numpy(v), expected[v.path], rtol=1e-5, atol=1e-7, err_msg=v.path)


def test_one_step_of_sgd_by_hand():
    model = model_of()
    before, grads = step(model, keras.optimizers.SGD(0.1))
    assert_weights(model, {p: w - 0.1 * ratio_of(p) * grads[p] for p, w in before.items()})


def test_momentum_by_hand():
    model = model_of()
    before, one, two = step(model, keras.optimizers.SGD(0.1, momentum=0.9), 2)
    expected = {}
    for p, w in before.items():
        first = -0.1 * ratio_of(p) * one[p]
        expected[p] = w + first + 0.9 * first - 0.1 * ratio_of(p) * two[p]
    assert_weights(model, expected)


def test_one_step_of_adamw_by_hand():
    """The decay of the weights is in proportion to the learning rate, as in torch's groups."""
    model = model_of()
    before, grads = step(model, keras.optimizers.AdamW(0.01, weight_decay=0.5, epsilon=1e-8))
    expected = {}
    for p, w in before.items():
        rate = 0.01 * ratio_of(p)
        decayed = w - rate * 0.5 * w
        # After one step the bias-corrected moments are the gradient and its square.
        expected[p] = decayed - rate * grads[p] / (np.abs(grads[p]) + 1e-8)
    assert_weights(model, expected)
    assert model.optimizer.weight_decay == 0.5


def test_weights_excluded_from_decay_stay_excluded():
    model = model_of()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5, epsilon=1e-8)
    optimizer.exclude_from_weight_decay(var_names=["kernel_lora_b"])
    before, grads = step(model, optimizer)
    for v in model.trainable_variables:
        if v.path.endswith("kernel_lora_b"):
            moved = 0.04 * np.sign(grads[v.path])
            np.testing.assert_allclose(numpy(v), before[v.path] - moved, rtol=1e-5, atol=1e-6)


def test_schedule():
    model = model_of()
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.1, 0.02])
    before, one, two = step(model, keras.optimizers.SGD(rates), 2)
    expected = {p: w - ratio_of(p) * (0.1 * one[p] + 0.02 * two[p]) for p, w in before.items()}
    assert_weights(model, expected)


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "Lion", "Lamb", "Nadam", "RMSprop"])
def test_ratio_one_is_the_optimizer_itself_and_another_one_is_not(name: str):
    weights = []
    for ratio in (None, 1.0, RATIO):
        model = model_of(ratio)
        step(model, getattr(keras.optimizers, name)(0.01), 3)
        weights.append({v.path: numpy(v) for v in model.trainable_variables})
    plain, one, more = weights
    for path, value in plain.items():
        assert np.array_equal(one[path], value), path
        assert np.array_equal(more[path], value) == (ratio_of(path) == 1), path


def fit(model: keras.Model, epochs: int, initial: int = 0) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((16, 5)), rng.standard_normal((16, 3))
    model.fit(x, y, batch_size=8, epochs=epochs, initial_epoch=initial, verbose=0, shuffle=False)


@pytest.mark.parametrize("jit", [True] if keras.backend.backend() == "jax" else [False, True])
def test_fit_and_resumed_step(jit: bool, tmp_path):
    def compiled() -> keras.Model:
        model = model_of()
        model.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=jit)
        return model

    whole, half, plain = compiled(), compiled(), model_of(None)
    plain.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=jit)
    fit(whole, 4)
    fit(plain, 4)
    fit(half, 2)
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.lora_cfg.lora_plus_ratio == RATIO
    fit(loaded, 4, 2)
    assert_resumed(loaded.get_weights(), whole.get_weights())
    b_of = [numpy(lora.lora_layers(m)[0].kernel_lora_b) for m in (whole, plain)]
    assert np.abs(b_of[0] - b_of[1]).max() > 1e-3


def test_together_with_adalora():
    model = model_of(method="adalora", lora_options={"total_step": 1, "target_rank": 2})
    before, grads = step(model, keras.optimizers.SGD(0.1))
    for v in model.trainable_variables:
        expected = before[v.path] - 0.1 * ratio_of(v.path) * grads[v.path]
        np.testing.assert_allclose(numpy(v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
def test_methods_with_a_b(method: str):
    model = model_of(method=method)
    before, grads = step(model, keras.optimizers.SGD(0.1))
    layer = lora.lora_layers(model)[0]
    path = layer.kernel_lora_b.path
    moved = numpy(layer.kernel_lora_b) - before[path]
    np.testing.assert_allclose(moved, -0.4 * grads[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["loha", "vera", "ia3", "full"])
def test_methods_without_a_b(method: str):
    with pytest.raises(ValueError, match=f"{method} has no factor B"):
        lora.LoRAConfig(lora_method=method, lora_plus_ratio=2.0)


def test_bad_ratio():
    with pytest.raises(ValueError, match="lora_plus_ratio has to be positive"):
        lora.LoRAConfig(lora_plus_ratio=0.0)
