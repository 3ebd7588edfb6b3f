"""Several adapters on one model: every move that is allowed, and a random walk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    numpy,
    relative_error,
    trained,
    values,
)
from tests.several import (
    ADAPTERS,
    base_model,
    batch,
    can_act,
    each_kind,
    expected_outputs,
    fields,
    fill,
    first_model,
    same,
    without_peft_warnings,
)
from tfimm_lora import lora
from tfimm_lora.weights.names import is_lora_weight


@pytest.fixture(scope="module")
def outputs() -> Any:
    return expected_outputs()


# --- One move after the other -----------------------------------------------------------------


@each_kind
def test_adding_changes_nothing_and_every_adapter_is_itself(kind, outputs):
    model = first_model(kind)
    before = values(model)
    lora.add_adapter(model, "b", **fields(kind, "b"))
    assert lora.adapter_names(model) == ("a", "b") and lora.active_adapters(model) == ("a",)
    now = values(model)
    assert_same_bits({k: now[k] for k in before}, before)
    assert all(".b" in path for path in now.keys() - before.keys()) and len(now) > len(before)
    assert not any(name.endswith(".b") for name in trained(model))
    lora.set_adapter(model, "b")  # as new: the base model, its head included
    same(model, outputs(kind, ()))
    fill(model, "b")
    same(model, outputs(kind, ("b",)))
    assert not any(name.endswith((".a", "head.bias", "top.bias")) for name in trained(model))
    lora.set_adapter(model, "a")
    same(model, outputs(kind, ("a",)))
    lora.set_adapter(model, ["a", "b"])
    same(model, outputs(kind, ("a", "b")), 1e-6)
    assert_same_bits({k: v for k, v in values(model).items() if k in before}, before)


def test_two_adapters_add_up():
    base = base_model("functional")
    model, x = first_model("functional", "ab"), batch(base)
    lora.set_adapter(model, ("b", "a"))
    weights = {path: value.astype("float64") for path, value in values(model).items()}
    one = weights["one/kernel"] + sum(
        weights[f"one/kernel_lora_a.{n}"] @ weights[f"one/kernel_lora_b.{n}"] for n in "ab"
    )
    regular = values(lora.convert_to_regular_model(model))
    np.testing.assert_allclose(regular["one/kernel"], one, rtol=1e-5, atol=1e-6)
    assert relative_error(lora.convert_to_regular_model(model)(x), model(x)) <= 1e-5


@each_kind
@pytest.mark.parametrize("active", ["a", "b", "c", "d", "ab", "ad", "abd"])
def test_disabled_is_the_base_model_and_afterwards_all_is_as_before(kind, active, outputs):
    model = first_model(kind, "abcd")
    if kind != "vit" and active == "abd":
        active = "ab"
    lora.set_adapter(model, tuple(active)) if can_act(kind, active) else lora.set_adapter(
        model, "a"
    )
    chosen, weights, flags = lora.active_adapters(model), values(model), trained(model)
    with lora.disable_adapters(model) as inside:
        assert inside is model and lora.active_adapters(model) == ()
        assert lora.adapter_names(model) == ("a", "b", "c", "d")
        same(model, outputs(kind, ()))
        assert not trained(model)
        assert_same_bits(
            {k: v for k, v in values(model).items() if not is_lora_weight(k.rpartition("/")[2])},
            values(base_model(kind)),
        )
        regular = lora.convert_to_regular_model(model)
    np.testing.assert_array_equal(numpy(regular(batch(model))), outputs(kind, ()))
    assert lora.active_adapters(model) == chosen
    assert_same_bits(values(model), weights)
    assert trained(model) == flags


def test_disabled_after_an_exception_and_with_flags_set_by_hand():
    model = first_model("vit")
    lora.set_trainable(model, train_bias="all")
    flags, weights = trained(model), values(model)
    with pytest.raises(ZeroDivisionError), lora.disable_adapters(model):
        assert lora.active_adapters(model) == ()
        1 / 0  # noqa: B018
    assert lora.active_adapters(model) == ("a",) and trained(model) == flags
    assert_same_bits(values(model), weights)


def test_batch_normalisation_that_is_trained_gets_its_statistics_back(outputs):
    """An adapter that trains the offset of a batch normalisation moves its statistics as well."""
    model = lora.convert_to_lora_model(
        base_model("functional"), lora_method="bitfit", lora_adapter_name="d"
    )
    x = batch(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(3 + 2 * x, np.zeros((4, 5)), epochs=2, verbose=0)
    tuned = numpy(model(x))
    moved = values(model)["norm/moving_mean"]
    with lora.disable_adapters(model):
        same(model, outputs("functional", ()))
    same(model, tuned)
    lora.add_adapter(model, "b", **fields("functional", "b"))
    lora.set_adapter(model, "b")
    same(model, outputs("functional", ()))
    model.fit(x, np.zeros((4, 5)), verbose=0) if not model.compiled else None
    lora.set_adapter(model, "d")
    same(model, tuned)
    np.testing.assert_array_equal(values(model)["norm/moving_mean"], moved)


@each_kind
def test_deleting(kind, outputs):
    model = first_model(kind, "abc")
    lora.set_adapter(model, ["a", "b"])
    lora.delete_adapter(model, "b")  # active, with another one
    assert lora.adapter_names(model) == ("a", "c") and lora.active_adapters(model) == ("a",)
    same(model, outputs(kind, ("a",)))
    assert not any(".b" in path for path in values(model))
    assert not any(".b" in layer.name for layer in model._flatten_layers())
    lora.add_adapter(model, "b", **fields(kind, "b"))  # the name is free again
    lora.set_adapter(model, "b")
    same(model, outputs(kind, ()))
    fill(model, "b")
    same(model, outputs(kind, ("b",)))
    assert lora.adapter_names(model) == ("a", "c", "b")
    assert set(values(model)) == set(values(first_model(kind, "acb")))


@each_kind
def test_deleting_the_first_hands_its_place_on(kind, outputs, tmp_path):
    model = first_model(kind, "abc")
    lora.set_adapter(model, "c")
    lora.delete_adapter(model, "a")
    cfg = getattr(model, "lora_cfg", None) or model.cfg
    assert cfg.lora_adapter_name == "b"
    assert cfg.lora_method == ADAPTERS[kind]["b"].get("lora_method", "lora")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert lora.adapter_names(loaded) == ("b", "c") and lora.active_adapters(loaded) == ("c",)
    same(loaded, outputs(kind, ("c",)))
    lora.set_adapter(loaded, "b")
    same(loaded, outputs(kind, ("b",)))
    with lora.disable_adapters(loaded):
        same(loaded, outputs(kind, ()))


@each_kind
def test_merging_merges_the_active_ones(kind, outputs):
    model = first_model(kind, "abd")
    active = ("a", "b")
    lora.set_adapter(model, active)
    weights = values(model)
    lora.merge_lora_weights(model)
    same(model, outputs(kind, active), 2e-5)
    regular = lora.convert_to_regular_model(model)
    assert relative_error(regular(batch(model)), outputs(kind, active)) <= 2e-5
    lora.unmerge_lora_weights(model)
    assert_same_bits(values(model), weights)
    lora.set_adapter(model, "d")
    same(model, outputs(kind, ("d",)))
    assert (
        relative_error(lora.convert_to_regular_model(model)(batch(model)), outputs(kind, ("d",)))
        <= 1e-6
    )


# --- A random walk ----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_random_walk(kind, seed, outputs, tmp_path: Path):
    """30 moves, legal and illegal, next to a model of the state that fits on a page."""
    random = np.random.default_rng([seed, len(kind)])
    with without_peft_warnings():
        saved = first_model(kind, "abcd")
        for name in "abcd":
            lora.set_adapter(saved, name)
            lora.save_adapter(saved, tmp_path / name, name)
    model = lora.load_adapter(base_model(kind), tmp_path / "a", "a")
    names, active, merged = ["a"], ("a",), False
    legal = 0

    def move() -> tuple[Any, bool, Any]:
        """A move, whether it is legal, and what the state is after it."""
        name = str(random.choice(list("abcd")))
        kinds = ["load"] * 2 + ["set"] * 4 + ["delete", "merge", "unmerge", "save", "weights"]
        what = str(random.choice(kinds))
        open_ = not merged
        if what == "load":
            new = name not in names
            after = ([*names, name], active, merged) if new else (names, active, merged)
            return lambda: lora.load_adapter(model, tmp_path / name, name), open_, after
        if what == "set":
            count = int(random.integers(1, 4))
            chosen = tuple(map(str, random.choice(list("abcd"), count, replace=False)))
            good = open_ and set(chosen) <= set(names) and can_act(kind, "".join(chosen))
            return lambda: lora.set_adapter(model, chosen), good, (names, chosen, merged)
        if what == "delete":
            rest = tuple(n for n in active if n != name)
            good = open_ and name in names and len(names) > 1 and bool(rest)
            left = [n for n in names if n != name]
            return lambda: lora.delete_adapter(model, name), good, (left, rest, merged)
        if what == "merge":
            good = open_ and not set(names) <= {"d"}
            return lambda: lora.merge_lora_weights(model), good, (names, active, True)
        if what == "unmerge":
            return lambda: lora.unmerge_lora_weights(model), merged, (names, active, False)
        return what, True, (names, active, False)

    for number in range(30):
        action, good, after = move()
        if isinstance(action, str):
            path = tmp_path / f"{number}{'.keras' if action == 'save' else '.weights.h5'}"
            if action == "save":
                model.save(path)
                model = keras.saving.load_model(path)
            else:
                model.save_weights(path)
                model.load_weights(path)
        elif good:
            action()
            legal += 1
        else:
            with pytest.raises(ValueError):
                action()
        if good:
            names, active, merged = after
        assert list(lora.adapter_names(model)) == names
        assert lora.active_adapters(model) == active
        same(model, outputs(kind, active), 5e-5)
        if not merged:
            with lora.disable_adapters(model):
                same(model, outputs(kind, ()))
    assert 6 <= legal <= 26
