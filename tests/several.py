"""Models with several adapters for the tests, and what is expected of them."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    images,
    numpy,
    randomize,
    relative_error,
    sequential,
    tiny_model,
)
from tfimm_lora import lora
from tfimm_lora.weights.names import is_lora_weight, named_variables

L = keras.layers

# What every kind of model is given: an adapter with a head and another rank per layer, one that is
# small and drops inputs, one that can only act alone, one that trains biases in place.
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "a": {"lora_rank": 2, "lora_targets": ("attn.q", "attn.v"), "lora_train_classifier": True},
        "b": {"lora_rank": 3, "lora_alpha": 5.0, "lora_method": "rslora", "lora_dropout": 0.1},
        "c": {"lora_rank": 2, "lora_method": "dora", "lora_targets": ("mlp.fc1",)},
        "d": {"lora_method": "bitfit"},
    },
    "convnext": {
        "a": {"lora_rank": 2, "lora_train_classifier": True},
        "b": {"lora_rank": 3, "lora_method": "loha", "lora_targets": ("mlp.fc2", "stem.0")},
        "c": {"lora_method": "oft", "lora_targets": ("mlp.fc1",)},
        "d": {"lora_method": "ln_tuning"},
    },
    "functional": {
        "a": {"lora_rank": 2, "lora_targets": ("one",), "lora_train_classifier": True},
        "b": {"lora_rank": 3, "lora_targets": ("one", "two"), "lora_dropout": 0.1},
        "c": {"lora_rank": 2, "lora_method": "dora", "lora_targets": ("two", "one")},
        "d": {"lora_method": "bitfit"},
    },
}
each_kind = pytest.mark.parametrize("kind", list(ADAPTERS))


def base_model(kind: str) -> keras.Model:
    if kind != "functional":
        return tiny_model(kind, depth=1) if kind == "vit" else tiny_model(kind)
    layers = (
        L.Dense(12, activation="gelu", name="one"),
        L.BatchNormalization(name="norm"),
        L.Dense(10, activation="gelu", name="two"),
        L.Dense(5, name="top"),
    )
    return randomize(sequential(*layers, shape=(8,)))


def batch(model: Any, size: int = 4) -> np.ndarray:
    if hasattr(model, "cfg"):
        return images(model, size)
    return np.random.default_rng(1).standard_normal((size, 8)).astype("float32")


def fields(kind: str, name: str) -> dict[str, Any]:
    return {"lora_train_classifier": False, **ADAPTERS[kind][name]}


def fill(model: keras.Model, name: str) -> None:
    """Gives the active adapter values that matter, as training would."""
    own = {id(v.variable) for v in model._adapter_state.own_weights(model, name)}
    for v in named_variables(model):
        mine = is_lora_weight(v.leaf) and v.leaf.endswith(f".{name}")
        if not mine and (id(v.variable) not in own or "moving" in v.path):
            continue
        # Whatever else the model has, the values are the same.
        generator = np.random.default_rng(zlib.crc32(f"{name} {v.path}".encode()))
        noise = generator.standard_normal(v.variable.shape).astype("float32")
        scale = 0.3 / np.sqrt(max(v.variable.shape[0], 1)) if v.leaf == "kernel" else 0.3
        v.variable.assign(v.variable * 0.0 + scale * noise if mine else v.variable + scale * noise)


def first_model(kind: str, names: str = "a") -> keras.Model:
    """A model with some adapters, filled; the first one is active."""
    model = lora.convert_to_lora_model(
        base_model(kind), lora_adapter_name=names[0], **fields(kind, names[0])
    )
    fill(model, names[0])
    for name in names[1:]:
        lora.add_adapter(model, name, **fields(kind, name))
        lora.set_adapter(model, name)
        fill(model, name)
    lora.set_adapter(model, names[0])
    return model


def same(model: keras.Model, expected: np.ndarray, tolerance: float = 0.0) -> None:
    found = numpy(model(batch(model)))
    if tolerance:
        assert relative_error(found, expected) <= tolerance
    else:
        np.testing.assert_array_equal(found, expected)


def expected_outputs() -> Any:
    """A function from kind and active adapters to outputs.

    Each is from a model that never had other adapters, and is made once.
    """
    known: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def of(kind: str, active: tuple[str, ...]) -> np.ndarray:
        key = kind, active
        if key not in known and not active:
            base = base_model(kind)
            known[key] = numpy(base(batch(base)))
        elif key not in known:
            model = first_model(kind, "".join(active))
            if len(active) > 1:
                lora.set_adapter(model, active)
            known[key] = numpy(model(batch(model)))
        return known[key]

    return of


@contextlib.contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Some of what is saved here PEFT does not read, and the package says so."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PEFT")
        yield


def can_act(kind: str, active: str) -> bool:
    """Whether adapters can act together, as the docs say: own weights and methods."""
    if len(active) == 1:
        return True
    overlaps = {"vit": {"ad"}, "convnext": set(), "functional": {"ad"}}[kind]
    alone = {"vit": {"bc"}, "convnext": {"ac"}, "functional": {"ac", "bc"}}[kind]
    pairs = {"".join(sorted(p)) for p in itertools.combinations(active, 2)}
    return not pairs & (overlaps | alone)
