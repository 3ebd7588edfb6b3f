"""Models survive their files: .keras and .weights.h5, here and in a process that knows nothing."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    TINY,
    answer_of,
    assert_same_bits,
    images,
    numpy,
    tiny_lora_model,
    tiny_model,
    values,
)
from tfimm_lora import lora

both = pytest.mark.parametrize("kind", ["vit", "convnext"])

# --- Fresh processes --------------------------------------------------------------------------

FRESH = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[1])
import IMPORTS
import numpy as np
answers = {}
for case in json.loads((folder / "cases.json").read_text()):
    x = np.load(folder / f"{case['id']}_x.npy")
    if case["lora"]:
        from tfimm_lora import lora
        create = lora.create_model
    else:
        create = tfimm_lora.create_model
    model = keras.saving.load_model(folder / f"{case['id']}.keras")
    again = create(case["name"], **case["fields"])
    again.load_weights(folder / f"{case['id']}.weights.h5")
    by_path = create(case["name"], model_path=folder / f"{case['id']}.weights.h5", **case["fields"])
    for key, m in [("keras", model), ("h5", again), ("path", by_path)]:
        np.save(folder / f"{case['id']}_{key}.npy", keras.ops.convert_to_numpy(m(x)))
    answers[case["id"]] = {
        "class": type(model).__name__,
        "cfg": repr(model.cfg),
        "facts": repr(model.pretrained_cfg),
        "trainable": sorted(v.path for v in model.trainable_weights),
        "rates": [l.rate for l in model._flatten_layers() if type(l).__name__ == "DropPath"],
    }
print(json.dumps(answers))
"""


@pytest.mark.parametrize(
    ("adapted", "imports"), [(False, "tfimm_lora, keras"), (True, "keras, tfimm_lora")]
)
def test_files_are_read_in_a_fresh_process(adapted: bool, imports: str, tmp_path):
    cases, models = [], {}
    for kind, (name, fields) in TINY.items():
        more = {"drop_path_rate": 0.1}
        if adapted:
            more |= {"lora_rank": 2, "lora_dropout": 0.1, "lora_train_bias": "all"}
        model = models[kind] = (tiny_lora_model if adapted else tiny_model)(kind, **more)
        cases.append({"id": kind, "name": name, "lora": adapted, "fields": {**fields, **more}})
        np.save(tmp_path / f"{kind}_x.npy", images(model))
        model.save(tmp_path / f"{kind}.keras")
        model.save_weights(tmp_path / f"{kind}.weights.h5")
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    answers = answer_of(FRESH.replace("IMPORTS", imports), tmp_path)
    for id, model in models.items():
        expected = numpy(model(images(model)))
        for key in ("keras", "h5", "path"):
            assert np.array_equal(np.load(tmp_path / f"{id}_{key}.npy"), expected), (id, key)
        assert answers[id] == {
            "class": type(model).__name__,
            "cfg": repr(model.cfg),
            "facts": repr(model.pretrained_cfg),
            "trainable": sorted(v.path for v in model.trainable_weights),
            "rates": [la.rate for la in model._flatten_layers() if type(la).__name__ == "DropPath"],
        }


IMPORTS = """
import json, sys
import keras                             # which imports matplotlib where it is installed
before = set(sys.modules)
import tfimm_lora
heavy = {"tensorflow_datasets", "matplotlib", "torch", "timm", "jsonargparse"}
print(json.dumps(sorted(heavy & (set(sys.modules) - before))))
"""

TABLES = """
import json, sys
import tfimm_lora
names = tfimm_lora.list_models("vit_*", pretrained=True, include_tags=True)
print(json.dumps([[h for h in ("keras", "tensorflow", "numpy") if h in sys.modules], len(names)]))
"""


def test_importing_adds_nothing_heavy_to_keras():
    assert answer_of(IMPORTS) == []


def test_names_and_tables_need_no_keras():
    loaded, count = answer_of(TABLES)
    assert loaded == []
    assert count > 50


REGISTERED = """
import json
exec(__import__("sys").argv[1])
import keras
print(json.dumps([n for n in keras.saving.get_custom_objects() if n.startswith("tfimm_lora")]))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import tfimm_lora",
        "import tensorflow, tfimm_lora",
        "from tfimm_lora.layers import Attention",  # imports Keras while it is incomplete itself
    ],
)
def test_classes_are_registered_whatever_imports_keras(code):
    names = answer_of(REGISTERED, code)
    assert {"tfimm_lora>LoRAViT", "tfimm_lora>ConvNeXt", "tfimm_lora>Attention"} <= set(names)


def test_a_model_is_made_without_torch_or_datasets():
    code = """
import json, sys
import tfimm_lora
from tfimm_lora import lora
lora.create_model("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=2, input_size=32)
print(json.dumps([m for m in ("torch", "tensorflow_datasets", "timm") if m in sys.modules]))
"""
    assert answer_of(code) == []


# --- Precision --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("make", [tiny_model, tiny_lora_model])
@pytest.mark.parametrize("there", ["float32", "mixed_float16"])
def test_a_model_keeps_its_precision_whatever_the_policy_is_there(make, kind, there, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make(kind)
    expected = numpy(keras.ops.cast(model(images(model)), "float32"))
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy(there)
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert keras.config.dtype_policy().name == there
    logits = restored(images(model))
    assert keras.backend.standardize_dtype(logits.dtype) == "bfloat16"
    np.testing.assert_array_equal(numpy(keras.ops.cast(logits, "float32")), expected)
    assert {v.dtype for v in restored.weights} <= {"float32", "uint32", "int64"}


# --- State beyond weights ---------------------------------------------------------------------


@both
@pytest.mark.parametrize("format", ["keras", "h5"])
def test_random_state_is_saved(kind: str, format: str, tmp_path):
    fields = {"drop_path_rate": 0.5, "drop_rate": 0.4, "lora_dropout": 0.3, "lora_rank": 2}
    model = tiny_lora_model(kind, **fields)
    x = images(model)
    model(x, training=True)
    if format == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = tiny_lora_model(kind, seed=5, **fields)
        loaded(x, training=True)
        loaded.load_weights(tmp_path / "model.weights.h5")
    for _ in range(3):
        assert np.array_equal(numpy(loaded(x, training=True)), numpy(model(x, training=True)))


@both
def test_compiled_state_is_saved(kind: str, tmp_path):
    model = tiny_lora_model(kind)
    x, y = images(model), np.arange(3) % 10
    model.compile(
        keras.optimizers.AdamW(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    state, found = ({v.path: numpy(v) for v in m.optimizer.variables} for m in (model, loaded))
    assert_same_bits(found, state)
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-6
    )


def test_policy_is_saved(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = tiny_model("vit")
    keras.config.set_dtype_policy("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.dtype_policy.name == "mixed_bfloat16"
    assert loaded.compute_dtype == "bfloat16"


# --- create_model(model_path=...) -------------------------------------------------------------


@both
@pytest.mark.parametrize("ending", [".safetensors", ".weights.h5", ".keras"])
def test_model_path(kind: str, ending: str, tmp_path):
    name, fields = TINY[kind]
    model = tiny_model(kind)
    path = tmp_path / f"model{ending}"
    if ending == ".safetensors":
        tfimm_lora.models.save_safetensors(model, path)
    elif ending == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    loaded = tfimm_lora.create_model(name, model_path=path, **fields)
    assert_same_bits(values(loaded), values(model))
    adapted = lora.create_model(name, model_path=str(path), lora_rank=3, **fields)
    assert lora.lora_layers(adapted)[0].lora_rank == 3
    assert np.array_equal(numpy(adapted(images(model))), numpy(model(images(model))))


@both
@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_model_path_of_a_lora_model(kind: str, ending: str, tmp_path):
    name, fields = TINY[kind]
    model = tiny_lora_model(kind, lora_rank=3)
    path = tmp_path / f"model{ending}"
    model.save(path) if ending == ".keras" else model.save_weights(path)
    loaded = lora.create_model(name, model_path=path, lora_rank=3, **fields)
    assert_same_bits(values(loaded), values(model))


@both
@pytest.mark.parametrize("ending", [".safetensors", ".weights.h5"])
def test_wrong_class_count_at_load_is_refused(kind: str, ending: str, tmp_path):
    name, fields = TINY[kind]
    model = tiny_model(kind)
    path = tmp_path / f"model{ending}"
    if ending == ".safetensors":
        tfimm_lora.models.save_safetensors(model, path)
        message = r"has a classifier of 10 classes and the model one of 1000. Pass nb_classes=10 to"
    else:
        model.save_weights(path)
        message = r"does not fit: .* this one has nb_classes=1000"
    # The model's own number is 1000; nobody asked for a fresh head.
    fields = {k: v for k, v in fields.items() if k != "nb_classes"}
    for create in (tfimm_lora.create_model, lora.create_model):
        with pytest.raises(ValueError, match=message):
            create(name, model_path=path, **fields)


@both
def test_a_keras_file_brings_its_config(kind: str, tmp_path):
    model = tiny_model(kind)
    model.save(tmp_path / "model.keras")
    loaded = tfimm_lora.create_model(TINY[kind][0], model_path=tmp_path / "model.keras")
    assert loaded.cfg == model.cfg
    assert_same_bits(values(loaded), values(model))
    adapted = lora.create_model(TINY[kind][0], model_path=tmp_path / "model.keras", lora_rank=3)
    assert adapted.cfg.nb_classes == 10 and lora.lora_layers(adapted)[0].lora_rank == 3
    adapted.save(tmp_path / "lora.keras")
    with pytest.raises(ValueError, match=r"holds a LoRA model. .* lora.create_model"):
        tfimm_lora.create_model(TINY[kind][0], model_path=tmp_path / "lora.keras")


@both
@pytest.mark.parametrize("ending", [".safetensors", ".keras"])
def test_a_chosen_class_count_gives_a_fresh_head(kind: str, ending: str, tmp_path):
    name, fields = TINY[kind]
    model = tiny_model(kind)
    path = tmp_path / f"model{ending}"
    tfimm_lora.models.save_safetensors(model, path) if ending != ".keras" else model.save(path)
    loaded = lora.create_model(name, model_path=path, **{**fields, "nb_classes": 4})
    head = model.cfg.classifier.replace(".", "/")
    for p, value in values(model).items():
        if not p.startswith(head + "/"):
            assert np.array_equal(values(loaded)[p], value), p
    assert {f"{head}/kernel", f"{head}/bias"} <= {
        v.path.split("/", 1)[1] for v in loaded.trainable_weights
    }


def test_unknown_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nothing\.saf"):
        tfimm_lora.create_model("convnext_tiny", model_path=tmp_path / "nothing.safetensors")
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(ValueError, match=r"end in .safetensors, .weights.h5 or .keras"):
        tfimm_lora.create_model("convnext_tiny", model_path=tmp_path / "model.h5")
