"""Adapter files that are broken, hostile or for another model: an error, and nothing changes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import assert_same_bits, images, numpy, randomize, tiny_model, values
from tfimm_lora import lora
from tfimm_lora.weights.names import is_lora_weight

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS: dict[str, Any] = {
    "lora_rank": 2, "lora_alpha": 3, "lora_targets": ["mlp.fc1"], "lora_train_classifier": False,
}  # fmt: skip
KEY = f"{PREFIX}blocks.1.mlp.fc1.lora_B.weight"


@pytest.fixture(scope="module")
def base() -> keras.Model:
    return tiny_model(seed=1)


@pytest.fixture
def folder(base: keras.Model, tmp_path: Path) -> Path:
    """An adapter as PEFT writes it, without our record."""
    model = randomize(
        lora.convert_to_lora_model(base, **FIELDS),
        only=is_lora_weight,
    )
    saved = lora.save_adapter(model, tmp_path / "adapter")
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, metadata={"format": "pt"})
    return saved


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def refused(base: keras.Model, folder: Path, message: str) -> None:
    """Loading raises and changes nothing: on a regular model, over an adapter, as a second one."""
    before = values(base)
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(base, folder)
    assert_same_bits(values(base), before)
    model = lora.convert_to_lora_model(base, **FIELDS)
    randomize(model, 5, only=is_lora_weight)
    x = images(model)
    state = model._adapter_state
    before, outputs = values(model), numpy(model(x))
    flags = {v.path: v.trainable for v in model.variables}
    for name in ("default", "second"):
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(model, folder, name)
        assert list(state.fields) == ["default"]
        assert state.active == ("default",)
        assert_same_bits(values(model), before)
        assert {v.path: v.trainable for v in model.variables} == flags
        assert np.array_equal(numpy(model(x)), outputs)
        assert all(list(la.adapters) == ["default"] for la in lora.lora_layers(model))


def test_the_file_is_fit_before_it_is_broken(base: keras.Model, folder: Path):
    model = lora.load_adapter(base, folder)
    assert all(la.scaling == 1.5 for la in lora.lora_layers(model))
    lora.load_adapter(model, folder, "second")
    assert list(model._adapter_state.fields) == ["default", "second"]


# --- Fields of the config ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r has to be an integer from 1 .* found 0"),
        ({"r": -3}, "r has to be an integer from 1 .* found -3"),
        ({"r": 10**9}, "r has to be an integer from 1 .* found 1000000000"),
        ({"r": 99_999}, "the rank is 99,999, and no tensor in .* has a side of more than 128"),
        ({"r": 2.0}, "r has to be an integer .* found 2.0"),
        ({"r": True}, "r has to be an integer .* found True"),
        ({"r": "2"}, "r has to be an integer .* found '2'"),
        ({"r": None}, "r has to be an integer .* found None"),
        ({"r": [2]}, "r has to be an integer"),
        (
            {"r": 3},
            r"lora_A.weight has shape \(2, 32\) in the adapter and \(3, 32\)|has rank 3 and",
        ),
        ({"lora_alpha": "8"}, "lora_alpha has to be a positive number, found '8'"),
        ({"lora_alpha": 0}, "lora_alpha has to be a positive number"),
        ({"lora_alpha": True}, "lora_alpha has to be a positive number"),
        ({"lora_dropout": 1.5}, "lora_dropout has to be a number from 0 to below 1"),
        ({"bias": "some"}, "bias has to be one of none, all, lora_only"),
        ({"bias": ["none"]}, "bias has to be one of"),
        ({"peft_type": "POLY"}, "peft_type is 'POLY', which cannot be read. Known: .*LORA"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\], which cannot be read"),
        ({"peft_type": None}, "peft_type is None, which cannot be read"),
        ({"target_modules": 3}, "target_modules has to be a text or a list of texts"),
        ({"target_modules": [["mlp.fc1"]]}, "target_modules has to be a text or a list of texts"),
        ({"target_modules": {"mlp.fc1": 1}}, "target_modules has to be a text or a list of texts"),
        ({"exclude_modules": 1}, "exclude_modules has to be a text or a list of texts"),
        ({"modules_to_save": "head"}, "modules_to_save has to be a list of texts"),
        ({"modules_to_save": [1]}, "modules_to_save has to be a list of texts"),
        ({"layers_to_transform": "1"}, "layers_to_transform has to be an integer or a list of int"),
        ({"layers_to_transform": [True]}, "layers_to_transform has to be an integer or a list"),
        ({"layers_pattern": 1}, "layers_pattern has to be a text or a list of texts"),
        ({"rank_pattern": ["mlp"]}, "rank_pattern has to be an object with ranks"),
        ({"rank_pattern": {"mlp.fc1": 10**9}}, "rank_pattern has to be an object with ranks"),
        ({"rank_pattern": {"mlp.fc1": True}}, "rank_pattern has to be an object with ranks"),
        ({"rank_pattern": {"mlp.fc1": 50_000}}, "the rank is 50,000, and no tensor"),
        ({"alpha_pattern": {"mlp.fc1": "1"}}, "alpha_pattern has to be an object with positive"),
        ({"alpha_pattern": {"mlp.fc1": -1}}, "alpha_pattern has to be an object with positive"),
        ({"use_rslora": "yes"}, "use_rslora has to be true or false, found 'yes'"),
        ({"fan_in_fan_out": 3}, "fan_in_fan_out has to be true or false"),
        ({"init_lora_weights": 7}, "init_lora_weights has to be true, false or a text"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path has to be a text"),
    ],
)
def test_a_field_of_the_wrong_kind(base, folder, changes: dict[str, Any], message: str):
    edit_config(folder, **changes)
    refused(base, folder, message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bdlora", True),
        ("use_something_new", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.fc1.weight"]),
        ("trainable_token_indices", [3]),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("megatron_config", {"x": 1}),
    ],
)
def test_fields_that_would_change_the_meaning(base, folder, key: str, value: Any):
    edit_config(folder, **{key: value})
    refused(base, folder, f"{key} is .*, which changes what the adapter does and cannot be read")


def test_fields_without_meaning_are_ignored(base: keras.Model, folder: Path):
    edit_config(
        folder, use_something_new=False, layer_replication=None, megatron_core="megatron.core",
        eva_config={"rho": 2.0}, loftq_config={}, ensure_weight_tying=False, task_type="X",
        auto_mapping={"base_model_class": "VisionTransformer"}, note_of_the_future="hello",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'note_of_the_future' is unknown and ignored"):
        lora.load_adapter(base, folder)


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "a/../b", "..", "a/b", "", ".hidden", "a b", "/etc", "a\x00b"]
)
def test_names_of_adapters_are_no_paths(base: keras.Model, folder: Path, name: str):
    with pytest.raises(ValueError, match="An adapter's name is made of letters, digits"):
        lora.load_adapter(base, folder, name)


@pytest.mark.parametrize(
    "place",
    ["../..", "org/..", "../repo", "org/repo/..", "org/repo@../../x", "org/repo@", "a/b/c",
     "hf-hub:../x", "hf-hub:org/repo@..", "-/../x"],
)  # fmt: skip
def test_places_on_the_hub_are_no_paths(base: keras.Model, place: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no adapter folder|has no adapter_model"):
        lora.load_adapter(base, place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{PREFIX}../../evil.lora_B.weight", "has no ../../evil"),
        (f"{PREFIX}blocks.9.mlp.fc1.lora_B.weight", r"has no blocks.9.mlp.fc1 \(its blocks end at"),
        ("../evil", "'../evil' does not start with 'base_model.model.'"),
        (f"{PREFIX}blocks.1.mlp.fc1.lora_C.weight", "Not in the model: blocks.1.mlp.fc1.lora_C"),
        (f"{PREFIX}head.weight", "Not in the model: head.weight"),
    ],
)
def test_tensors_that_the_model_has_not(base, folder, name: str, message: str):
    edit_tensors(folder, **{name: np.ones((10, 32), "float32")})
    refused(base, folder, message)


def test_targets_that_are_paths(base: keras.Model, folder: Path):
    edit_config(folder, target_modules=["../../etc/passwd"])
    refused(base, folder, r"target_modules=\['../../etc/passwd'\] match no module of the model")


# --- Tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(base: keras.Model, folder: Path, value: float):
    wrong = load_file(folder / WEIGHTS)[KEY].copy()
    wrong[3, 1] = value
    edit_tensors(folder, **{KEY: wrong})
    refused(base, folder, "blocks.1.mlp.fc1.lora_B.weight' has values that are not finite")


@pytest.mark.parametrize(
    ("dtype", "name"), [("int32", "I32"), ("bool", "BOOL"), ("float64", "F64"), ("uint8", "U8")]
)
def test_types_that_are_no_weights(base: keras.Model, folder: Path, dtype: str, name: str):
    edit_tensors(folder, **{KEY: np.ones((128, 2), dtype)})
    refused(base, folder, f"has the type {name}; weights of adapters are F32, F16, BF16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read(base: keras.Model, folder: Path, dtype: str):
    half = {k: v.astype(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    model = lora.load_adapter(base, folder)
    found = model.blocks[1].mlp.fc1.kernel_lora_b
    np.testing.assert_array_equal(numpy(found), half[KEY].astype("float32").T)


@pytest.mark.parametrize(
    "shape", [(127, 2), (2, 128), (128, 3), (128,), (128, 2, 1, 1, 1), (0, 2), (128, 0), ()]
)
def test_shapes_that_do_not_fit(base: keras.Model, folder: Path, shape: tuple[int, ...]):
    edit_tensors(folder, **{KEY: np.ones(shape, "float32")})
    refused(base, folder, r"blocks.1.mlp.fc1.*shape|blocks.1.mlp.fc1: ")


def test_a_missing_tensor(base: keras.Model, folder: Path):
    edit_tensors(folder, **{KEY: None})
    refused(base, folder, "Missing in the adapter: blocks.1.mlp.fc1.lora_B.weight")
    edit_tensors(folder, **{KEY.replace("_B", "_A"): None})
    refused(base, folder, r"target_modules also mean blocks.1.mlp.fc1, which the file has no ten")


def test_a_declared_tensor_of_ten_gigabytes(base: keras.Model, folder: Path):
    """Declared only, and really there, as a hole in the file: never read."""
    size = 10 * 2**30
    header = json.dumps(
        {KEY: {"dtype": "F32", "shape": [size // 8, 2], "data_offsets": [0, size]}}
    ).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(base, folder, "is no complete safetensors file")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(8 + len(header) + size)
    start = time.perf_counter()
    refused(base, folder, r"holds 2,684,354,560 weights, the model has [\d,]+. An adapter is small")
    assert time.perf_counter() - start < 60


def test_a_pickle_is_not_opened(base: keras.Model, folder: Path):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model.bin is a pickle, which can run code"
    ):
        lora.load_adapter(base, folder)


# --- Regular expressions ----------------------------------------------------------------------

SLOW = r"((blocks|\.|\d|mlp|[a-z0-9.])+)+\.nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": SLOW},
        {"target_modules": ["mlp.fc1"], "exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 2}},
        {"alpha_pattern": {"(.*)*(.*)*(.*)*x": 2}},
        {"modules_to_save": [SLOW]},
        {"layers_pattern": SLOW, "layers_to_transform": [0], "target_modules": ["fc1"]},
    ],
)
def test_patterns_that_take_for_ever(base: keras.Model, folder: Path, changes: dict[str, Any]):
    """Python's matcher needs exponential time for them."""
    edit_config(folder, **changes)
    start = time.perf_counter()
    try:
        lora.load_adapter(base, folder)
    except ValueError as error:
        assert "match no module" in str(error)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("((", "is no regular expression"),
        ("a" * 30_000, "has 30,000 characters, at most 20,000 are read"),
        ("(" * 5_000 + ")" * 5_000, "is no regular expression"),
    ],
)
def test_patterns_that_cannot_be_read(base, folder, pattern: str, message: str):
    edit_config(folder, target_modules=pattern)
    refused(base, folder, message)


# --- What this package recorded ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"lora_rank": 10**9}}, "the rank 1,000,000,000 is too large"),
        ({"lora": {"lora_rank": "2"}}, "lora_rank has to be an integer"),
        ({"lora": {"lora_targets": "(("}}, "is no regular expression"),
        ({"lora": {"lora_options": [1]}}, "lora_options has to be an object"),
        ({"lora": {"lora_rank_pattern": 3}}, "lora_rank_pattern has to be an object"),
        ({"lora": {"lora_nothing": 3}}, "lora_nothing"),
        ({"lora": {"embed_dim": 7}}, "'embed_dim' is no field of an adapter"),
        ({"lora": 7}, "lora has to be a dict"),
        ({"base_sha256": None}, "base_sha256 has to be a str"),
        ({"model": 3}, "model has to be a str"),
    ],
)
def test_a_record_that_is_damaged(base, tmp_path, changes: dict[str, Any], message: str):
    model = lora.convert_to_lora_model(base, lora_rank=2, lora_targets=["mlp.fc1"])
    folder = lora.save_adapter(model, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    record = {"version": "1", "model": "vit", "base_sha256": "0", "lora": {}, "config": config}
    record |= changes
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"tfimm_lora": json.dumps(record)})
    refused(base, folder, message)


def test_a_record_that_is_no_json(base: keras.Model, folder: Path):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"tfimm_lora": "[" * 100_000})
    refused(base, folder, "tfimm_lora is no JSON object: it is nested too deeply")


# --- Another model ----------------------------------------------------------------------------


def test_an_adapter_of_another_width(folder: Path):
    wider = tiny_model(embed_dim=64, num_heads=2)
    refused(wider, folder, r"The adapter is for a model of width 32, this one has 64")


def test_an_adapter_of_another_depth_or_architecture(base: keras.Model, folder: Path):
    message = r"has no blocks.1.mlp.fc1 \(its blocks end at 0: the adapter's model is deeper\)"
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(tiny_model(depth=1), folder)
    with pytest.raises(
        ValueError, match=r"another architecture: the model has no blocks.0.mlp.fc1"
    ):
        lora.load_adapter(tiny_model("convnext"), folder)
    with pytest.raises(ValueError, match=r"also mean blocks.2.mlp.fc1, which the file has no"):
        edit_config(folder, target_modules=["fc1"])
        lora.load_adapter(tiny_model(depth=3), folder)


def test_an_adapter_of_ours_names_both_models(base: keras.Model, tmp_path: Path):
    model = lora.convert_to_lora_model(base, lora_rank=2, lora_targets=["mlp.fc1"])
    folder = lora.save_adapter(model, tmp_path)
    for other in (tiny_model("convnext"), tiny_model("vit", embed_dim=64)):
        with pytest.raises(ValueError, match=r"vit_tiny_patch16_224.*(convnext_tiny|vit_tiny)"):
            lora.load_adapter(other, folder)
