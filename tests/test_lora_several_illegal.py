"""Several adapters on one model: every move that is not allowed."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    numpy,
    trained,
    values,
)
from tests.several import (
    base_model,
    batch,
    expected_outputs,
    fields,
    fill,
    first_model,
    same,
)
from tfimm_lora import lora
from tfimm_lora.models.features import FeatureExtractor


@pytest.fixture(scope="module")
def outputs() -> Any:
    return expected_outputs()


def refused(model: keras.Model, match: str, move: Any) -> None:
    """A move raises, and neither weights nor flags nor state change."""
    before, flags = values(model), trained(model)
    state = lora.adapter_names(model), lora.active_adapters(model)
    with pytest.raises(ValueError, match=match):
        move()
    assert (lora.adapter_names(model), lora.active_adapters(model)) == state
    assert trained(model) == flags
    assert_same_bits(values(model), before)


# --- What is not allowed ----------------------------------------------------------------------


def test_illegal_moves_in_the_active_state(outputs):
    model = first_model("vit", "abcd")
    rank = {"lora_rank": 2}
    refused(model, "has an adapter 'b' already", lambda: lora.add_adapter(model, "b", **rank))
    refused(model, "made of letters", lambda: lora.add_adapter(model, "x/../y", **rank))
    refused(model, "takes fields that start", lambda: lora.add_adapter(model, "x", rank=2))
    refused(model, "two names", lambda: lora.add_adapter(model, "x", lora_adapter_name="y", **rank))
    refused(model, "matches no layer", lambda: lora.add_adapter(model, "x", lora_targets=("no",)))
    refused(
        model,
        "no weights below 'nowhere'",
        lambda: lora.add_adapter(model, "x", lora_modules_to_save=("nowhere",)),
    )
    refused(model, "has no adapter 'x'. It has a, b, c, d", lambda: lora.set_adapter(model, "x"))
    refused(model, "named twice", lambda: lora.set_adapter(model, ["a", "a"]))
    refused(model, "disable_adapters", lambda: lora.set_adapter(model, []))
    refused(model, "cannot act together", lambda: lora.set_adapter(model, ["b", "c"]))
    refused(model, "both have values of their own for", lambda: lora.set_adapter(model, ["a", "d"]))
    refused(model, "has no adapter 'x'", lambda: lora.delete_adapter(model, "x"))
    refused(
        model,
        r"'a' is the only active adapter. Activate another one \(b, c, d\)",
        lambda: lora.delete_adapter(model, "a"),
    )
    single = first_model("vit", "a")
    refused(
        single, "only adapter. lora.convert_to_regular", lambda: lora.delete_adapter(single, "a")
    )
    same(model, outputs("vit", ("a",)))


def test_illegal_moves_while_switched_off(tmp_path, outputs):
    model = first_model("vit", "ab")
    lora.save_adapter(model, tmp_path, "a")
    model.save_weights(tmp_path / "m.weights.h5")
    model.compile("sgd", "mse")
    x, y = batch(model), np.zeros((4, 10), "float32")
    model.fit(x, y, verbose=0)
    before = values(model)
    moves = [
        lambda: lora.add_adapter(model, "x", lora_rank=2),
        lambda: lora.set_adapter(model, "b"),
        lambda: lora.delete_adapter(model, "b"),
        lambda: lora.disable_adapters(model).__enter__(),
        lambda: lora.merge_lora_weights(model),
        lambda: lora.combine_adapters(model, ["b"], [1.0], "x"),
        lambda: lora.swap_adapter(model, tmp_path / "a", "a"),
        lambda: lora.load_adapter(model, tmp_path / "a", "x"),
        lambda: lora.load_adapter(model, tmp_path / "a", "a"),
        lambda: model.save(tmp_path / "no.keras"),
        lambda: model.save_weights(tmp_path / "m.weights.h5"),
        lambda: model.load_weights(tmp_path / "m.weights.h5"),
        lambda: model.fit(x, y, verbose=0),
        lambda: model.train_on_batch(x, y),
    ]
    with lora.disable_adapters(model):
        for move in moves:
            refused(model, r"\(a\) are switched off inside lora.disable_adapters", move)
            same(model, outputs("vit", ()))
    assert not (tmp_path / "no.keras").exists()
    assert_same_bits(values(model), before)
    model.load_weights(tmp_path / "m.weights.h5")  # is whole
    same(model, outputs("vit", ("a",)))


def test_illegal_moves_while_merged(tmp_path, outputs):
    model = first_model("vit", "ab")
    lora.save_adapter(model, tmp_path, "a")
    lora.merge_lora_weights(model)
    moves = [
        lambda: lora.add_adapter(model, "x", lora_rank=2),
        lambda: lora.set_adapter(model, "b"),
        lambda: lora.delete_adapter(model, "b"),
        lambda: lora.disable_adapters(model).__enter__(),
        lambda: lora.merge_lora_weights(model),
        lambda: lora.combine_adapters(model, ["b"], [1.0], "x"),
        lambda: lora.swap_adapter(model, tmp_path / "a", "a"),
        lambda: lora.load_adapter(model, tmp_path / "a", "x"),
    ]
    for move in moves:
        refused(model, "merged", move)
    model.save(tmp_path / "merged.keras")
    loaded = keras.saving.load_model(tmp_path / "merged.keras")
    same(loaded, outputs("vit", ("a",)))
    lora.set_adapter(loaded, "b")
    same(loaded, outputs("vit", ("b",)))
    lora.unmerge_lora_weights(model)
    same(model, outputs("vit", ("a",)))
    with pytest.raises(ValueError, match="not merged"):
        lora.unmerge_lora_weights(model)


def test_models_without_adapters():
    base = base_model("vit")
    calls = [
        lambda m: lora.add_adapter(m, "x", lora_rank=2),
        lambda m: lora.set_adapter(m, "x"),
        lambda m: lora.delete_adapter(m, "x"),
        lambda m: lora.disable_adapters(m).__enter__(),
        lambda m: lora.combine_adapters(m, ["x"], [1.0], "y"),
        lambda m: lora.swap_adapter(m, "nowhere"),
        lora.adapter_names,
        lora.active_adapters,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"is no LoRA model\. Use lora\.convert_to_lora"):
            call(base)
        with pytest.raises(ValueError, match="is no LoRA model"):
            call(FeatureExtractor(base, [0]))
    alone = keras.Sequential([keras.Input((4,)), lora.LoRADense(3)])
    with pytest.raises(ValueError, match="is no LoRA model"):
        lora.add_adapter(alone, "x")


def test_full_fine_tuning_cannot_be_switched_off_but_others_join_it(outputs):
    model = lora.convert_to_lora_model(
        base_model("vit"), lora_method="full", lora_adapter_name="all"
    )
    lora.add_adapter(model, "b", **fields("vit", "b"))
    fill(model, "all")
    full = numpy(model(batch(model)))
    refused(model, "no copy of the base model's is kept", lambda: lora.set_adapter(model, "b"))
    refused(
        model,
        "'all' .*cannot be switched off",
        lambda: lora.disable_adapters(model).__enter__(),
    )
    lora.set_adapter(model, ["all", "b"])
    same(model, full)
    # Added to a model that has its base weights, it can be left again.
    model = first_model("vit", "a")
    lora.add_adapter(model, "all", lora_method="full")
    lora.set_adapter(model, "all")
    same(model, outputs("vit", ()))
    fill(model, "all")
    with lora.disable_adapters(model):
        same(model, outputs("vit", ()))
    lora.set_adapter(model, "a")
    same(model, outputs("vit", ("a",)))
