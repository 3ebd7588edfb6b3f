"""Whole models with quantised kernels: created, loaded, converted, saved; and their adapters."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    TINY,
    answer_of,
    assert_same_bits,
    gradients,
    images,
    numpy,
    randomize,
    relative_error,
    sequential,
    tiny_lora_model,
    tiny_model,
    trained,
)
from tests.quantized import FAKE, PACKED, all_weights, packed_layers
from tfimm_lora import lora, models
from tfimm_lora.quantization import StoresKernel
from tfimm_lora.weights.names import is_lora_weight, iterate_layers, named_variables, timm_path

L = keras.layers
both = pytest.mark.parametrize("kind", ["vit", "convnext"])
FIELDS: dict[str, Any] = {"lora_rank": 2, "lora_train_classifier": False}
INT4: dict[str, Any] = {"lora_quantization": "int4", "lora_group_size": 16}
HEAD = {"vit": "head", "convnext": "head.fc"}


def size_of(name: str) -> int | None:
    return 16 if "int4" in name else None


def quantized(base: keras.Model, seed: int | None = 5, **fields: Any) -> keras.Model:
    """A LoRA model of a base whose updates are not zero (``seed=None``: as it begins)."""
    model = lora.convert_to_lora_model(base, **{**FIELDS, **fields})
    return model if seed is None else randomize(model, seed, only=is_lora_weight)


def formats(model: keras.Model) -> dict[str, str | None]:
    """Names of the formats by timm path."""
    return {
        timm_path(path): layer.kernel_format and layer.kernel_format.name
        for path, layer in iterate_layers(model)
        if isinstance(layer, StoresKernel)
    }


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield
    assert not [str(w.message) for w in found if w.category is UserWarning]


# --- Creating, loading, converting ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("vit", name) for name in (*PACKED, *FAKE)),
        *(("convnext", name) for name in ("int4", "int8", "nf4", "fake-int4")),
    ],
)
def test_quantised_while_loading_equals_quantised_afterwards(kind: str, name: str, tmp_path):
    base = tiny_model(kind)
    base.save_weights(tmp_path / "base.weights.h5")
    arch, overrides = TINY[kind]
    given = {**overrides, **FIELDS, "model_path": str(tmp_path / "base.weights.h5")}
    wanted = {"lora_quantization": name, "lora_group_size": size_of(name)}
    loaded = lora.create_model(arch, **given, **wanted)
    later = lora.create_model(arch, **given)
    lora.quantize(later, name, size_of(name))
    converted = lora.convert_to_lora_model(base, **FIELDS, **wanted)
    assert set(formats(loaded).values()) == {name}
    randomize(loaded, 5, only=is_lora_weight)
    for model in (later, converted):
        assert formats(model) == formats(loaded)
        assert model.cfg == loaded.cfg
        randomize(model, 5, only=is_lora_weight)
        assert {v.path for v in model.weights} == {v.path for v in loaded.weights}
        assert_same_bits(all_weights(model), all_weights(loaded))
    x = images(loaded)
    assert relative_error(loaded(x), base(x)) > 1e-4
    assert np.array_equal(numpy(loaded(x)), numpy(later(x)))


@both
def test_formats_by_pattern(kind: str):
    stem = {"vit": "patch_embed", "convnext": "stem"}[kind]
    wanted = {HEAD[kind]: None, stem: "int8", "mlp.fc1": "nf4", "*": "int4/16"}
    model = tiny_lora_model(kind, lora_quantization=wanted, **FIELDS)
    for module, name in formats(model).items():
        expected = (
            None if module == HEAD[kind] else "int8" if module.startswith(stem)
            else "nf4" if module.endswith("fc1") else "int4"
        )  # fmt: skip
        assert name == expected, module
    x = images(model)
    assert np.isfinite(numpy(model(x))).all()
    # The rest stays as it is, also in what is saved.
    lora.quantize(model, {"mlp.fc2": "int8"}, keep_adapters=True)
    found = formats(model)
    assert {n for m, n in found.items() if m.endswith("fc2")} == {"int8"}
    assert {n for m, n in found.items() if m.endswith("fc1")} == {"nf4"}
    again = type(model).from_config(model.get_config())
    again.build((None, *model.cfg.input_size, 3))
    assert formats(again) == found


def test_a_fresh_classifier_stays_in_float():
    model = tiny_lora_model(lora_rank=2, **INT4)
    assert formats(model)["head"] is None
    assert {"head.weight", "head.bias"} <= trained(model)
    assert set(formats(model).values()) == {None, "int4"}


def test_codes_are_transferred_as_they_are():
    source = quantized(tiny_model(), **INT4)
    target = quantized(tiny_model(seed=4), seed=7, **INT4)
    models.transfer_weights(source, target)
    expected = all_weights(source)
    for path, value in all_weights(target).items():
        if "lora" not in path:
            assert value.tobytes() == expected[path].tobytes(), path
    # In another format the values are read and rounded.
    other = quantized(tiny_model(seed=4), seed=5, lora_quantization="int8")
    models.transfer_weights(source, other)
    x = images(source)
    assert relative_error(other(x), source(x)) <= 0.1


def test_a_float_file_goes_into_a_quantised_model(tmp_path):
    """Also a LoRA model's, with its adapter."""
    base = tiny_model()
    float_model, expected = quantized(base), quantized(base, **INT4)
    float_model.save_weights(tmp_path / "float.weights.h5")
    model = quantized(tiny_model(seed=4), seed=None, **INT4)
    model.load_weights(tmp_path / "float.weights.h5")
    assert_same_bits(all_weights(model), all_weights(expected))


def test_printed_numbers_count_weights_not_bytes(capsys):
    counted = []
    for fields in ({}, INT4, {"lora_quantization": "nf4"}, {"lora_quantization": "fake-int8"}):
        lora.print_trainable_parameters(tiny_lora_model(**FIELDS, **fields))
        counted.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(set(counted)) == 1
    assert re.search(r"trainable params: [\d,]{5,}", counted[0])


LOAD = """
import sys, keras, json
import numpy as np
from tests.helpers import numpy
model = keras.saving.load_model(sys.argv[1])
x = np.load(sys.argv[2])
weights = {v.path.replace("/", "|"): numpy(v) for v in model.weights}
np.savez(sys.argv[3], y=numpy(model(x)), **weights)
print(json.dumps([v.path for v in model.trainable_weights]))
"""


@both
def test_saved_and_loaded_in_a_fresh_process(kind: str, tmp_path: Path):
    formats_ = {HEAD[kind]: None, "mlp.fc1": "nf4", "mlp.fc2": "fake-int4", "*": "int4"}
    model = tiny_lora_model(kind, lora_quantization=formats_, lora_group_size=16, lora_rank=2)
    x = images(model)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    found = tmp_path / "found.npz"
    paths = answer_of(LOAD, tmp_path / "model.keras", tmp_path / "x.npy", found)
    assert paths == [v.path for v in model.trainable_weights]
    with np.load(found) as answer:
        values = {k.replace("|", "/"): v for k, v in answer.items()}
    assert np.array_equal(values.pop("y"), numpy(model(x)))
    assert_same_bits(values, all_weights(model))


def test_files_are_as_small_as_the_formats(tmp_path):
    sizes = {}
    for name in (None, "int8", "int4"):
        size = 32 if name == "int4" else None
        model = tiny_lora_model(
            embed_dim=192, num_heads=3, depth=2, lora_rank=1, lora_targets=("attn.q",),
            lora_train_classifier=False, lora_quantization=name, lora_group_size=size,
        )  # fmt: skip
        path = tmp_path / f"{name}.weights.h5"
        model.save_weights(path)
        other = sum(
            4 * int(np.prod(v.shape))
            for v in model.weights
            if "kernel" not in v.path.split("/")[-1]
        )
        sizes[name] = path.stat().st_size - other
    # Beside the kernels the files have names and offsets, about 150 kB.
    slack = 200_000
    assert sizes["int8"] <= 0.26 * sizes[None] + slack < 0.5 * sizes[None]
    assert sizes["int4"] <= 0.19 * sizes[None] + slack < 0.5 * sizes[None]


# --- Functional and Sequential models ---------------------------------------------------------


def _functional() -> keras.Model:
    inputs = keras.Input((12, 12, 4))
    x = L.Conv2D(16, 3, activation="relu", name="first")(inputs)
    x = L.Add()([L.Conv2D(16, 3, padding="same", name="second")(x), x])
    x = L.GlobalAveragePooling2D()(x)
    return randomize(keras.Model(inputs, L.Dense(5, name="top")(x), name="net"))


def _sequential() -> keras.Model:
    layers = [L.Conv2D(16, 3, name="first"), L.Flatten(), L.Dense(8, name="second"), L.Dense(5)]
    return randomize(sequential(*layers, shape=(8, 8, 4)))


@pytest.mark.parametrize("create", [_functional, _sequential])
@pytest.mark.parametrize("name", ["int4", "int8", "fake-int4"])
def test_models_of_other_layers(create, name: str, tmp_path):
    base = create()
    wanted = {"lora_quantization": {"second": name, "*": "int8"}}
    model = quantized(base, lora_targets=("first", "second"), **wanted)
    assert formats(model)["second"] == name and formats(model)["first"] == "int8"
    x = np.random.default_rng(0).standard_normal((2, *base.input_shape[1:])).astype("float32")
    assert 1e-4 < relative_error(quantized(base, None, **wanted)(x), base(x)) < 0.7
    later = quantized(base, lora_targets=("first", "second"))
    lora.quantize(later, {"second": name, "*": "int8"}, keep_adapters=True)
    assert_same_bits(all_weights(later), all_weights(model))
    for each in (model, later):
        each.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert_same_bits(all_weights(loaded), all_weights(each))
        assert np.array_equal(numpy(loaded(x)), numpy(each(x)))
    assert relative_error(model.predict(x, verbose=0), model(x)) <= 1e-5


# --- Adapters ---------------------------------------------------------------------------------


@both
def test_several_adapters_share_the_codes(kind: str):
    model = quantized(tiny_model(kind), **INT4)
    x, before = images(model), all_weights(model)
    first = numpy(model(x))
    lora.add_adapter(model, "b", lora_rank=3, lora_method="dora", lora_train_classifier=False)
    randomize(model, 8, only=lambda leaf: leaf.endswith(".b"))
    lora.set_adapter(model, "b")
    assert relative_error(model(x), first) > 1e-2
    with lora.disable_adapters(model):
        base = numpy(model(x))
    assert relative_error(quantized(tiny_model(kind), None, **INT4)(x), base) <= 1e-6
    lora.set_adapter(model, "default")
    assert np.array_equal(numpy(model(x)), first)
    lora.delete_adapter(model, "b")
    assert_same_bits(all_weights(model), before)


@pytest.mark.parametrize("name", ["int4", "nf4", "fake-int4"])
@both
def test_every_example_with_its_own_adapter(kind: str, name: str):
    fields = {"lora_quantization": name, "lora_group_size": size_of(name)}
    model = quantized(tiny_model(kind), **fields)
    lora.add_adapter(model, "b", lora_rank=3, lora_train_classifier=False)
    randomize(model, 8, only=lambda leaf: leaf.endswith(".b"))
    x = images(model, batch=4)
    alone = {}
    for adapter in ("default", "b"):
        lora.set_adapter(model, adapter)
        alone[adapter] = numpy(model(x))
    order = ["default", "b", "b", "default"]
    expected = np.stack([alone[adapter][i] for i, adapter in enumerate(order)])
    ids = lora.adapter_ids(model, order)
    assert relative_error(model({"image": x, "adapter": ids}), expected) <= 1e-5


@pytest.mark.parametrize("name", ["int4", "nf4", "fake-int8"])
def test_an_adapter_comes_back_to_the_base_it_was_trained_on(name: str, tmp_path):
    base = tiny_model()
    fields = {"lora_quantization": name, "lora_group_size": size_of(name)}
    model = quantized(base, **fields)
    x, outputs = images(model), numpy(model(images(model)))
    lora.save_adapter(model, tmp_path)
    with no_warning():
        # The regular model is converted as the adapter says, kernels included.
        fresh = lora.load_adapter(base, tmp_path)
        in_place = lora.load_adapter(quantized(base, seed=9, **fields), tmp_path)
        second = quantized(base, seed=9, **fields)
        lora.load_adapter(second, tmp_path, "second")
        swapped = quantized(base, seed=9, **fields)
        lora.swap_adapter(swapped, tmp_path)
    lora.set_adapter(second, "second")
    for found in (fresh, in_place, second, swapped):
        assert formats(found) == formats(model)
        assert np.array_equal(numpy(found(x)), outputs)
    with pytest.raises(ValueError, match="was trained on other weights"):
        lora.load_adapter(tiny_model(seed=3), tmp_path)


@pytest.mark.parametrize(
    ("saved", "other"), [(INT4, {}), ({}, INT4), (INT4, {"lora_quantization": "int8"})]
)
def test_an_adapter_on_kernels_of_another_format_is_warned_about(saved, other, tmp_path):
    base = tiny_model()
    model, target = quantized(base, **saved), quantized(base, seed=9, **other)
    lora.save_adapter(model, tmp_path)
    mine, theirs = (repr(f.get("lora_quantization")) for f in (other, saved))
    message = f"trained on kernels with lora_quantization={theirs}.* has lora_quantization={mine}"
    for load in (lora.load_adapter, lora.swap_adapter):
        with pytest.warns(UserWarning, match=message):
            load(target, tmp_path)
    x = images(model)
    assert 1e-4 < relative_error(target(x), model(x)) <= 0.7
    with no_warning():
        lora.load_adapter(target, tmp_path, check_base=False)


def test_an_adapter_that_was_added_later_records_the_kernels(tmp_path):
    base = tiny_model()
    model = quantized(base, **INT4)
    lora.add_adapter(model, "b", lora_rank=3, lora_train_classifier=False)
    randomize(model, 8, only=lambda leaf: leaf.endswith(".b"))
    lora.set_adapter(model, "b")
    folder = lora.save_adapter(model, tmp_path, "b")
    x = images(model)
    with no_warning():
        loaded = lora.load_adapter(base, folder)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert lora.active_adapters(again) == ("b",)
    assert_same_bits(all_weights(again), all_weights(model))


def test_a_kernel_that_was_packed_can_be_made_trainable_again():
    model = quantized(tiny_model(), **INT4)
    lora.quantize(model, {"head": None}, keep_adapters=True)
    lora.add_adapter(model, "b", lora_rank=2, lora_train_classifier=True)
    lora.set_adapter(model, "b")
    assert {"head.weight", "head.bias"} <= trained(model)
    randomize(model, 8, only=lambda leaf: leaf.endswith(".b"))
    before = all_weights(model)
    model.compile("sgd", "mse")
    x = images(model)
    model.fit(x, np.eye(3, 10, dtype="float32"), verbose=0)
    changed = {k for k, v in all_weights(model).items() if v.tobytes() != before[k].tobytes()}
    assert changed == {v.path for v in model.trainable_weights}


@pytest.mark.parametrize("fields", [{}, {"lora_quantization": {"head": None, "*": "int4/16"}}])
def test_what_was_frozen_at_first_gets_gradients_when_another_adapter_trains_it(fields: dict):
    model = quantized(tiny_model(), **fields)
    lora.add_adapter(model, "b", lora_rank=2, lora_train_classifier=True, lora_train_bias="all")
    lora.set_adapter(model, "b")
    randomize(model, 8, only=lambda leaf: leaf.endswith(".b"))
    found = gradients(model, images(model))
    for v in named_variables(model):
        assert v.variable.trainable == (found[v.path] is not None), v.path
    assert np.any(found["head/kernel"]) and np.any(found["blocks_0/mlp/fc1/bias"])


def test_a_compiled_model_notices_another_format():
    model = quantized(tiny_model())
    x = images(model)
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    lora.quantize(model, "int4", 16, keep_adapters=True)
    outputs = numpy(model(x))
    assert relative_error(model.predict(x, verbose=0), outputs) <= 1e-5
    model.fit(x, outputs, verbose=0)
    assert len(packed_layers(model)) == 10


def test_features_of_a_quantised_backbone():
    name, overrides = TINY["vit"]
    fields = {k: v for k, v in overrides.items() if k != "nb_classes"}
    model = lora.create_model(name, features_only=True, lora_rank=2, **fields, **INT4)
    packed = packed_layers(model.backbone)
    assert {la.name for la in packed} == {"proj", "qkv", "fc1", "fc2"}
    before = [numpy(f) for f in model(images(model.backbone))]
    for layer in packed:
        layer.kernel.assign(-numpy(layer.kernel))
    after = [numpy(f) for f in model(images(model.backbone))]
    assert all(relative_error(a, b) > 0.1 for a, b in zip(after, before, strict=True))
