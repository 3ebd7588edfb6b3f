"""Files in the layouts of Keras 2, made here: what is read, and what is refused and how.

Files that tfimm itself has written are in ``parity/test_tfimm_files.py``.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    TINY,
    assert_same_bits,
    images,
    randomize,
    relative_error,
    tiny_lora_model,
    tiny_model,
    values,
)
from tests.keras2_layout import keras2_weights, write_h5
from tfimm_lora import lora
from tfimm_lora.cli.merge import merge
from tfimm_lora.training.config import ModelSection
from tfimm_lora.weights.tfimm_files import is_tfimm_file, read_tfimm

both = pytest.mark.parametrize("kind", ["vit", "convnext"])


def load(path: Path, kind: str = "vit", **changes: Any) -> keras.Model:
    name, fields = TINY[kind]
    return tfimm_lora.create_model(name, model_path=path, **{**fields, **changes})


# --- What is read -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("options", [{}, {"root": "/model_weights"}, {"chunks": 2}], ids=str)
@pytest.mark.parametrize("file", ["model.h5", "model.weights.h5", "model.hdf5"])
def test_every_weight_arrives(kind: str, options: dict[str, Any], file: str, tmp_path: Path):
    model = tiny_model(kind)
    path = write_h5(tmp_path / file, keras2_weights(model), **options)
    assert is_tfimm_file(path)
    assert_same_bits(values(load(path, kind)), values(model))
    adapted = lora.create_model(TINY[kind][0], model_path=str(path), lora_rank=2, **TINY[kind][1])
    found = {p: v for p, v in values(adapted).items() if "_lora_" not in p}
    assert_same_bits(found, values(model))


@both
def test_low_rank_factors_arrive(kind: str, tmp_path: Path):
    model = tiny_lora_model(kind, lora_rank=3, lora_alpha=2.0)
    path = write_h5(tmp_path / "model.h5", keras2_weights(model))
    name, fields = TINY[kind]
    loaded = lora.create_model(name, model_path=path, lora_rank=3, lora_alpha=2.0, **fields)
    assert_same_bits(values(loaded), values(model))
    with pytest.raises(ValueError, match=r"LoRA model of rank 3\. Load it with lora\.create_model"):
        load(path, kind)
    with pytest.raises(ValueError, match=r"of rank 3, and the model's is 8\. Pass lora_rank=3\."):
        lora.create_model(name, model_path=path, lora_rank=8, lora_alpha=2.0, **fields)
    with pytest.raises(ValueError, match=r"does not say its alpha"):
        lora.create_model(name, model_path=path, lora_rank=3, **fields)


def test_weights_inside_another_model_have_its_name_in_front(tmp_path: Path):
    model = tiny_model("convnext")
    path = write_h5(tmp_path / "model.h5", keras2_weights(model, "outer/net"))
    assert_same_bits(values(load(path, "convnext")), values(model))


@both
def test_the_command_line_takes_them(kind: str, tmp_path: Path):
    name, fields = TINY[kind]
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model(kind)))
    adapted = randomize(
        lora.create_model(name, model_path=path, lora_rank=2, **fields), only="_lora_"
    )
    lora.save_adapter(adapted, tmp_path / "adapter")
    section = ModelSection(name=name, path=str(path), options=fields)
    difference, _ = merge(tmp_path / "adapter", section, tmp_path / "merged.safetensors")
    assert difference < 1e-4
    merged = load(tmp_path / "merged.safetensors", kind)
    assert relative_error(merged(images(adapted)), adapted(images(adapted))) < 1e-4


def test_half_precision_is_read(tmp_path: Path):
    weights = {n: v.astype("float16") for n, v in keras2_weights(tiny_model()).items()}
    loaded = keras2_weights(load(write_h5(tmp_path / "model.h5", weights)))
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded[name], value.astype("float32"))


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_files(kept: float, tmp_path: Path):
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model()))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    for create in (tfimm_lora.create_model, lora.create_model):
        with pytest.raises(ValueError, match=r"no complete HDF5 file \(\d+ bytes\).*truncated"):
            create(TINY["vit"][0], model_path=path, **TINY["vit"][1])


def test_listed_and_not_there(tmp_path: Path):
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model()))
    with h5py.File(path, "a") as file:
        del file["head"]["net/head/kernel:0"]
    with pytest.raises(ValueError, match=r"lists the weight 'net/head/kernel:0' and does not have"):
        load(path)
    with h5py.File(path, "a") as file:
        del file["head"]
    with pytest.raises(ValueError, match=r"lists the layer 'head' and does not have it"):
        load(path)


def test_weights_of_another_model(tmp_path: Path):
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model("convnext")))
    with pytest.raises(
        ValueError, match=r"read as weights that tfimm has saved, do not fit .*stages.0"
    ):
        load(path)
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model()))
    with pytest.raises(ValueError, match=r"model.h5: Weight '.*' has shape \(.*\) in the source"):
        load(path, embed_dim=16)
    with pytest.raises(ValueError, match=r"classifier of 10 classes.*Pass nb_classes=10"):
        tfimm_lora.create_model(
            TINY["vit"][0],
            model_path=path,
            **{k: v for k, v in TINY["vit"][1].items() if k != "nb_classes"},
        )


def test_a_surplus_weight_is_named(tmp_path: Path):
    weights = keras2_weights(tiny_model()) | {"other/dense/kernel:0": np.zeros((2, 2), "float32")}
    path = write_h5(tmp_path / "model.h5", weights)
    with pytest.raises(ValueError, match=r"Not in the model: other.dense.weight\."):
        load(path)


def test_files_without_weights(tmp_path: Path):
    path = write_h5(tmp_path / "model.h5", {})
    with pytest.raises(ValueError, match=r"weights files end in"):  # no name of a layer: not Keras'
        load(path)
    no_weights = pytest.raises(ValueError, match=r"holds no weights that tfimm.*save_weights")
    with no_weights, read_tfimm(path):
        pass
    with pytest.raises(FileNotFoundError, match="no weights file"), read_tfimm(tmp_path / "no.h5"):
        pass


def test_a_whole_model_of_keras_3(tmp_path: Path):
    path = write_h5(tmp_path / "model.h5", keras2_weights(tiny_model()), "3.10.0", "model_weights")
    with pytest.raises(
        ValueError, match=r"HDF5 file of a whole model that Keras 3 has saved.*load_"
    ):
        load(path)


@pytest.mark.parametrize("member", ["stem_conv/vars/0", "patch_embed/projection/vars/0"])
@pytest.mark.parametrize("file", ["model.weights.h5", "model.h5"])
def test_weights_without_names(member: str, file: str, tmp_path: Path):
    path = tmp_path / file
    with h5py.File(path, "w") as written:
        written[member] = np.zeros((2, 2), "float32")
    for create in (tfimm_lora.create_model, lora.create_model):
        with pytest.raises(ValueError, match=r"no names of weights.*save_weights\('model.h5'\)"):
            create(TINY["vit"][0], model_path=path, **TINY["vit"][1])


def test_a_keras_file_of_keras_2(tmp_path: Path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "2.15.0"}')
    with pytest.raises(ValueError, match=r"no names of weights.*tf.keras.models.load_model"):
        load(path)


@pytest.mark.parametrize("kind", ["external link", "external data", "virtual", "text", "group"])
def test_what_is_no_array_in_the_file(kind: str, tmp_path: Path):
    """A file from a stranger must not get at other files."""
    weights = keras2_weights(tiny_model())
    path = write_h5(tmp_path / "model.h5", weights)
    name = "net/head/bias:0"
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = weights[name]
    with h5py.File(path, "a") as file:
        group = file["head"]
        del group[name]
        if kind == "external link":
            group[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
        elif kind == "external data":
            group.create_dataset(name, (10,), "float32", external=str(tmp_path / "other.h5"))
        elif kind == "virtual":
            layout = h5py.VirtualLayout((10,), "float32")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (10,))
            group.create_virtual_dataset(name, layout)
        elif kind == "text":
            group[name] = ["a"] * 10
        else:
            group.create_group(name)
    with pytest.raises(ValueError, match=r"'net/head/bias:0' is no array in this file"):
        load(path)


# --- Checkpoints of TensorFlow ----------------------------------------------------------------


def write_checkpoint(folder: Path, names: list[str]) -> Path:
    """A checkpoint of variables with these names."""
    import tensorflow as tf

    root = tf.Module()
    root.variables_ = [tf.Variable(np.ones((2, 2), "float32"), name=name) for name in names]
    return Path(tf.train.Checkpoint(root).write(str(folder / "model.ckpt")))


def test_a_checkpoint_of_another_model(tmp_path: Path):
    path = write_checkpoint(tmp_path, ["net/a/kernel", "net/b/kernel"])
    with pytest.raises(ValueError, match=r"do not fit the model.*Not in the model: a.weight, b.we"):
        load(path)


def test_an_incomplete_checkpoint(tmp_path: Path):
    path = write_checkpoint(tmp_path, ["net/a/kernel"])
    index = path.with_name("model.ckpt.index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"no complete checkpoint of Keras 2.*all .data files"):
        load(path)
    index.write_bytes(whole)
    path.with_name("model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(ValueError, match=r"no complete checkpoint of Keras 2.*all .data files"):
        load(path)


def test_a_checkpoint_without_variables(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no weights\. Save the model after its first call"):
        load(write_checkpoint(tmp_path, []))


def test_a_folder_that_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match=r"TensorFlow checkpoint or the folder of a SavedModel"):
        load(tmp_path)
    (tmp_path / "checkpoint").write_text("")  # a manager that has not saved anything
    with pytest.raises(ValueError, match=r"TensorFlow checkpoint or the folder of a SavedModel"):
        load(tmp_path)


def test_a_pickle_called_a_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"is a pickle or an archive that can run code"):
        load(path)
