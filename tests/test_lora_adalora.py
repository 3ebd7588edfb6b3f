"""AdaLoRA: the schedule, the allocation in the compiled step, and what is saved of it."""

from __future__ import annotations

import json
import types
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
    values,
)
from tfimm_lora import lora
from tfimm_lora.evaluation import plot_rank_history
from tfimm_lora.lora.adalora import budget_at, budget_steps
from tfimm_lora.lora.methods.adalora_options import AdaLoRAOptions
from tfimm_lora.lora.optimizer_hooks import hooks_of
from tfimm_lora.weights.names import is_lora_weight

OPTIONS = {"target_rank": 2, "tinit": 2, "tfinal": 3, "delta_t": 2}
FIELDS: dict[str, Any] = {
    "lora_method": "adalora",
    "lora_rank": 4,
    "lora_options": OPTIONS,
    "lora_train_classifier": True,
}


def model_of(seed: int | None = None, **fields: Any) -> keras.Model:
    """Four adapted layers and a classifier."""
    hidden = [keras.layers.Dense(12, "gelu", name=f"fc_{i}") for i in range(1, 5)]
    base = randomize(sequential(*hidden, keras.layers.Dense(10, name="head"), shape=(12,)))
    model = lora.convert_to_lora_model(base, **{**FIELDS, "lora_targets": ["fc.*"], **fields})
    return model if seed is None else randomize(model, seed, only=is_lora_weight)


def vit_of(*targets: str) -> keras.Model:
    return tiny_lora_model("vit", seed=None, **FIELDS, lora_targets=list(targets))


def data(model: keras.Model, count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((count, 12)).astype("float32")
    return (images(model, count) if hasattr(model, "cfg") else x), np.arange(count) % 10


def compiled(model: keras.Model, optimizer: Any = None, **options: Any) -> keras.Model:
    optimizer = keras.optimizers.Adam(3e-3) if optimizer is None else optimizer
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **options)
    return model


def diagonals(model: keras.Model) -> list[np.ndarray]:
    return [
        numpy(u.variables["kernel_lora_e"]) for la in lora.lora_layers(model) for u in la.updates
    ]


def ranks(model: keras.Model) -> list[int]:
    return [int(np.count_nonzero(e)) for e in diagonals(model)]


def fit(model: keras.Model, epochs: int = 5, **options: Any) -> keras.Model:
    x, y = data(model)
    model.fit(
        x, y, **{"batch_size": 4, "epochs": epochs, "verbose": 0, "shuffle": False, **options}
    )
    return model


# --- The schedule ------------------------------------------------------------------------------


def test_budget_falls_with_the_cube_between_the_first_and_the_last_steps():
    options = AdaLoRAOptions(tinit=2, tfinal=4)
    found = [budget_at(step, 36, 18, options, 20) for step in range(1, 21)]
    assert found == [36, 36, 32, 29, 26, 24, 22, 21, 20, 19, 18, 18] + 8 * [18]


@pytest.mark.parametrize("total", [4, 7, 20, 1000, 123_457])
@pytest.mark.parametrize(("first", "target"), [(36, 18), (864, 300), (5, 5), (12, 1)])
def test_counting_steps_gives_the_budget(total: int, first: int, target: int):
    options = AdaLoRAOptions(tinit=1, tfinal=2)
    falls = budget_steps(first, target, options, total)
    assert falls.shape == (first - target,)
    last = total - options.tfinal
    for step in {*range(1, min(last, 60) + 1), *range(max(last - 60, 1), last + 1)}:
        budget = budget_at(step, first, target, options, total)
        assert first - int((falls <= step).sum()) == budget, step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 0}, "target_rank"),
        ({"delta_t": 0}, "delta_t"),
        ({"tinit": -1}, "tinit"),
        ({"beta1": 1.0}, "beta1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "of 10 steps none"),
        ({"target_r": 2}, "target_rank"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        model_of(lora_options=options)


def test_target_above_the_rank():
    with pytest.raises(ValueError, match="target_rank=5 is above the mean rank 4"):
        model_of(lora_options={"target_rank": 5})


# --- Training ----------------------------------------------------------------------------------


# JAX without compilation takes every operation by itself, which takes minutes.
@pytest.mark.parametrize("jit", [True] if keras.backend.backend() == "jax" else [False, True])
def test_plain_compile_and_fit_prune_to_the_target(jit: bool):
    model = fit(compiled(vit_of("mlp.fc1", "mlp.fc2"), jit_compile=jit))  # 20 steps
    assert sum(ranks(model)) == 4 * 2
    assert len(set(ranks(model))) > 1, "the layers are to differ"
    history = lora.rank_history(model)
    assert history["step"][0] == 0 and history["step"][-1] == 20
    assert sorted(history["ranks"]) == [f"blocks.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)]
    assert [r[-1] for r in history["ranks"].values()] == ranks(model)
    totals = np.sum(list(history["ranks"].values()), axis=0)
    assert totals[0] == 16 and (np.diff(totals) <= 0).all() and totals[-1] == 8
    # The schedule by itself: nothing in the first two steps, then at every second one.
    options = AdaLoRAOptions(**OPTIONS)
    for step, total in zip(history["step"], totals, strict=True):
        last = 17 if step >= 17 else step - step % 2
        assert total == (16 if step <= 2 else budget_at(last, 16, 8, options, 20)), step
    # Training that goes on keeps the ranks.
    fit(model, 1)
    assert ranks(model) == [r[-1] for r in history["ranks"].values()]


def test_steps_of_the_optimizer_by_hand():
    """Importance, uncertainty, scores, threshold and mask, in NumPy."""
    options = {"target_rank": 1, "delta_t": 1, "beta1": 0.7, "beta2": 0.6, "total_step": 6}
    base = randomize(sequential(keras.layers.Dense(5, name="site"), shape=(3,)))
    model = lora.convert_to_lora_model(
        base, lora_method="adalora", lora_rank=4, lora_options=options
    )
    randomize(model, 2, only=is_lora_weight)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    variables = model.trainable_variables
    names = [v.name for v in variables]
    model.optimizer.build(variables)
    rng = np.random.default_rng(3)
    own = {v.name: numpy(v).astype("float64") for v in variables}
    smooth = {n: np.zeros_like(v) for n, v in own.items()}
    spread = {n: np.zeros_like(v) for n, v in own.items()}
    for step in range(1, 7):
        grads = [rng.standard_normal(v.shape).astype("float32") for v in variables]
        model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
        for n, g in zip(names, grads, strict=True):
            own[n] = own[n] - np.float32(0.1) * g
            if step < 6:
                now = np.abs(own[n] * g)
                smooth[n] = 0.7 * smooth[n] + 0.3 * now
                spread[n] = 0.6 * spread[n] + 0.4 * np.abs(now - smooth[n])
        score = {n: smooth[n] * spread[n] for n in names}
        total = (
            score["kernel_lora_e"]
            + score["kernel_lora_a"].mean(axis=0)
            + score["kernel_lora_b"].mean(axis=1)
        )
        lost = 4 - budget_at(step, 4, 1, AdaLoRAOptions(**options), 6)
        kept = total > np.sort(total)[lost - 1] if lost else np.ones(4, bool)
        own["kernel_lora_e"] = np.where(kept, own["kernel_lora_e"], 0)
        for v in variables:
            np.testing.assert_allclose(numpy(v), own[v.name], rtol=1e-4, atol=1e-6)
    assert hooks_of(model.optimizer).allocators[0].ranks() == [1]


def test_penalty_is_the_mean_over_all_matrices_and_acts_in_training_only():
    model = model_of(seed=4, lora_options={"orth_reg_weight": 0.3})
    expected = []
    for layer in lora.lora_layers(model):
        a, b = numpy(layer.kernel_lora_a), numpy(layer.kernel_lora_b)
        expected += [np.linalg.norm(m - np.eye(4)) for m in (a.T @ a, b @ b.T)]
    x, _ = data(model)
    model(x, training=True)
    assert len(model.losses) == len(lora.lora_layers(model))
    assert float(sum(model.losses)) == pytest.approx(0.3 * np.mean(expected), rel=1e-5)
    model(x, training=False)
    assert not model.losses


def test_penalty_reaches_the_loss_of_fit():
    logs = []
    for weight in (0.0, 0.5):
        model = compiled(model_of(lora_options={"orth_reg_weight": weight}, seed=4))
        x, y = data(model)
        logs.append(model.fit(x, y, verbose=0, epochs=2, batch_size=16).history["loss"][0])
    assert logs[1] > logs[0] + 0.1


def test_gradient_accumulation_counts_whole_steps():
    model = compiled(model_of(), keras.optimizers.Adam(3e-3, gradient_accumulation_steps=2))
    fit(model, 10)  # 40 batches, 20 steps
    history = lora.rank_history(model)
    assert history["step"][-1] == 20
    assert sum(ranks(model)) == 8


def test_mixed_float16_scales_the_loss_and_prunes():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(model_of())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, 6)
    # Steps with infinite gradients are left out, so perhaps not all have been made.
    allocator = hooks_of(model.optimizer).allocators[0]
    assert 20 <= allocator.step <= 24
    assert sum(allocator.ranks()) <= 10


def test_unknown_number_of_steps():
    model = compiled(model_of())
    x, y = data(model)

    def batches():
        while True:
            yield x[:4], y[:4]

    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(batches(), epochs=2, verbose=0)
    with pytest.raises(ValueError, match="total_step"):
        model.train_on_batch(x, y)
    model.fit(batches(), epochs=4, steps_per_epoch=5, verbose=0)
    assert sum(ranks(model)) == 8


def test_replicas_of_tf_distribute_are_refused():
    optimizer = keras.optimizers.Adam()
    own = getattr(optimizer, "_distribution_strategy", None)
    extended = getattr(own, "extended", None)
    strategy = types.SimpleNamespace(num_replicas_in_sync=2, extended=extended)
    object.__setattr__(optimizer, "_distribution_strategy", strategy)
    model = compiled(model_of(), optimizer)
    with pytest.raises(ValueError, match="2 replicas"):
        optimizer.build(model.trainable_variables)


def test_too_few_steps():
    with pytest.raises(ValueError, match="of 4 steps none"):
        fit(compiled(model_of()), 1)


def test_own_number_of_steps():
    model = compiled(model_of(lora_options={**OPTIONS, "total_step": 8}))
    x, y = data(model)
    for _ in range(8):
        model.train_on_batch(x, y)
    assert sum(ranks(model)) == 8


def test_several_adapters_only_the_active_one_is_pruned():
    model = model_of()
    other = {**FIELDS, "lora_rank": 6, "lora_targets": ["fc.*"], "lora_train_classifier": False}
    lora.add_adapter(model, "other", **other)
    before = {k: v for k, v in values(model).items() if ".other" in k}
    fit(compiled(model))
    assert sum(ranks(model)) == 8
    assert all(np.array_equal(values(model)[k], v) for k, v in before.items())
    lora.set_adapter(model, "other")
    fit(compiled(model))
    history = lora.rank_history(model, "other")
    assert sum(r[-1] for r in history["ranks"].values()) == 8
    assert sum(r[0] for r in history["ranks"].values()) == 24
    with pytest.raises(ValueError, match="default, other"):
        lora.rank_history(model)


# --- Saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [2, 4])
def test_resumed_steps_are_the_ones_that_would_have_been_made(after: int, tmp_path):
    """Saved in the middle of the schedule and after its end."""
    whole = compiled(model_of(seed=None))
    start = whole.get_weights()
    fit(whole, 5)
    halves = compiled(model_of(seed=None))
    halves.set_weights(start)
    fit(halves, 5, callbacks=[_StopAfter(after)])
    halves.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(whole.optimizer)
    fit(loaded, 5, initial_epoch=after)
    assert_resumed(loaded.get_weights(), whole.get_weights())
    assert ranks(loaded) == ranks(whole) and sum(ranks(whole)) == 8
    assert_resumed(loaded.optimizer.variables, whole.optimizer.variables)


class _StopAfter(keras.callbacks.Callback):
    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 >= self.epochs


def test_config_of_the_optimizer_is_that_of_keras():
    plain = keras.optimizers.Adam(3e-3)
    model = compiled(model_of())
    fit(model)
    assert model.optimizer.get_config().keys() == plain.get_config().keys()
    assert isinstance(type(model.optimizer).from_config(model.optimizer.get_config()), type(plain))


def test_models_without_need_have_plain_optimizers():
    model = compiled(model_of(lora_method="lora", lora_options={}))
    assert "apply" not in vars(model.optimizer)


@pytest.mark.parametrize("targets", [["mlp.fc1", "attn.proj"], ["attn.q", "attn.v"]])
def test_pruned_adapter_file(targets: list[str], tmp_path):
    model = fit(compiled(vit_of(*targets)))
    folder = lora.save_adapter(model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["total_step"] == 20
    kept = {k: sum(v) for k, v in config["rank_pattern"].items()}
    assert sum(kept.values()) == 8 and len(kept) == (4 if len(targets[0]) > 6 else 2)
    x = images(model)
    loaded = vit_of(*targets)
    for v, w in zip(loaded.variables, model.variables, strict=True):
        if not is_lora_weight(v.name):
            v.assign(w)
    lora.load_adapter(loaded, tmp_path)
    # Pruned rows of A and columns of B are gone, what they do not do is the same.
    assert relative_error(loaded(x), model(x)) <= 1e-6
    assert sum(ranks(loaded)) == 8


def test_a_layer_without_ranks_in_a_file(tmp_path):
    model = model_of(seed=5)
    first = lora.lora_layers(model)[0]
    first.kernel_lora_e.assign(np.zeros(4, "float32"))
    lora.save_adapter(model, tmp_path)
    loaded = model_of()
    loaded.set_weights(model.get_weights())
    randomize(loaded, 6, only=is_lora_weight)
    lora.load_adapter(loaded, tmp_path)
    x, _ = data(model)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))
    assert ranks(loaded) == [0, 4, 4, 4]
    # A file whose tensors and pattern do not fit together changes nothing.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    method = type(first.updates[0])
    tensors = {"fc.1.lora_A": np.ones((3, 12)), "fc.1.lora_B": np.ones((12, 2)),
               "fc.1.lora_E": np.ones((3, 1))}  # fmt: skip
    config["rank_pattern"] = {"fc.1.lora_E": [True, True, True, False]}
    with pytest.raises(ValueError, match=r"fc.1: lora_A has 3 of 4 ranks"):
        method.complete_peft(config, tensors, {})
    config["rank_pattern"] = {"fc.1.lora_E": [True] * 5}
    with pytest.raises(ValueError, match="5 entries where init_r is 4"):
        method.complete_peft(config, tensors, {})


def test_a_fresh_adapter_is_saved_whole(tmp_path):
    model = model_of()
    folder = lora.save_adapter(model, tmp_path)
    text = (folder / "adapter_config.json").read_text()
    assert '"rank_pattern": {}' in text


def test_merging_and_converting_a_pruned_model():
    model = fit(compiled(model_of()))
    x, _ = data(model)
    outputs = numpy(model(x))
    assert relative_error(lora.convert_to_regular_model(model)(x), outputs) <= 1e-5
    lora.merge_lora_weights(model)
    assert relative_error(model(x), outputs) <= 1e-5


def test_models_around_a_lora_model_are_prepared_by_hand():
    inner = model_of(lora_options={**OPTIONS, "total_step": 8})
    inputs = keras.Input((12,))
    outer = keras.Model(inputs, keras.layers.Dense(10)(inner(inputs)))
    compiled(outer, lora.prepare_optimizer(keras.optimizers.Adam(3e-3), inner))
    x, y = data(inner)
    outer.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert sum(ranks(inner)) == 8


# --- Plot --------------------------------------------------------------------------------------


def test_plot(tmp_path):
    history = {"step": [0, 5, 10], "ranks": {"a.fc1": [4, 3, 2], "a.fc2": [4, 4, 2]}}
    plot_rank_history(history, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no steps"):
        plot_rank_history({"step": [], "ranks": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_no_history_before_training():
    with pytest.raises(ValueError, match="fit"):
        lora.rank_history(model_of())
