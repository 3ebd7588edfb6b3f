"""Safetensors files: what is read, what is refused, what a broken one says."""

from __future__ import annotations

import json
import pickle
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tfimm_lora
from tests.helpers import TINY, assert_same_bits, images, numpy, sequential, tiny_model, values
from tfimm_lora import lora, models, weights
from tfimm_lora.weights.safetensors_file import write_aside, write_safetensors

both = pytest.mark.parametrize("kind", ["vit", "convnext"])


def create(kind: str, path, **fields) -> keras.Model:
    name, overrides = TINY[kind]
    return tfimm_lora.create_model(name, model_path=path, **{**overrides, **fields})


@pytest.fixture
def saved(request, tmp_path):
    """A tiny model and its safetensors file."""
    model = tiny_model(getattr(request, "param", "vit"))
    return model, models.save_safetensors(model, tmp_path / "model.safetensors")


# --- Round trips ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_precision_on_disk(kind: str, dtype: str, tmp_path):
    model = tiny_model(kind)
    path = models.save_safetensors(model, tmp_path / "model.safetensors", dtype=dtype)
    stored = load_file(path)
    assert {str(v.dtype) for v in stored.values()} == {dtype}
    loaded = create(kind, path)
    assert {str(w.dtype) for w in loaded.weights} == {"float32"}
    number = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = {p: v.astype(number).astype("float32") for p, v in values(model).items()}
    assert_same_bits(values(loaded), expected)


@both
def test_keys_and_layouts_are_torchs(kind: str, tmp_path):
    model = tiny_model(kind)
    stored = load_file(models.save_safetensors(model, tmp_path / "m.safetensors"))
    found = values(model)
    if kind == "vit":
        assert {"cls_token", "pos_embed", "blocks.1.norm2.weight", "head.bias"} <= set(stored)
        dense, conv = "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"
        assert np.array_equal(stored[dense], found["blocks_0/attn/qkv/kernel"].T)
        assert np.array_equal(stored[conv], found["patch_embed/proj/kernel"].transpose(3, 2, 0, 1))
    else:
        assert {"stem.1.weight", "stages.1.downsample.0.bias", "head.fc.bias"} <= set(stored)
        name = "stages.2.blocks.0.conv_dw.weight"
        assert stored[name].shape == (24, 1, 7, 7)
        kernel = found["stages_2/blocks_0/conv_dw/kernel"]
        assert np.array_equal(stored[name][5, 0], kernel[:, :, 5, 0])
        assert "stages.0.blocks.0.gamma" in stored


def test_lora_models_are_refused_and_say_what_to_do(tmp_path):
    model = lora.convert_to_lora_model(tiny_model())
    with pytest.raises(ValueError, match=r"has LoRA weights .*save_adapter\(model, folder\)"):
        models.save_safetensors(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    regular = lora.convert_to_regular_model(model)
    models.save_safetensors(regular, tmp_path / "model.safetensors")


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has to end in \.safetensors, found 'model\.pth'"):
        models.save_safetensors(tiny_model(), tmp_path / "model.pth")


def test_batch_norm_statistics_have_torchs_names():
    model = sequential(keras.layers.BatchNormalization(name="bn1"), shape=(4, 4, 3))
    names = {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"}
    # The last "1" of a layer's name belongs to it: only an underscore makes it an index.
    assert set(weights.timm_variables(model)) == names


# --- Broken files -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 4, 8, 9, 100, 0.3, 0.9, -1])
def test_truncated_anywhere(saved, keep):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is no complete safetensors file \("):
        create("vit", path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all!",
        b'{"head.weight": 3} ',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
        b'{"a":{"dtype":"F32","shape":[400],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}',
    ],
)
def test_corrupt_header(header: bytes, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"no complete safetensors file .*truncated; download or"):
        create("vit", path)


def test_header_length_beyond_reason(saved):
    _, path = saved
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        create("vit", path)


# --- Pickles ----------------------------------------------------------------------------------


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


REFUSED = r"can run code when it is opened.*not read.*\.safetensors file, or convert it"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin", "model.safetensors"])
def test_pickles_are_refused_unopened(name: str, protocol: int, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "boom"), protocol=protocol))
    with pytest.raises(ValueError, match=REFUSED):
        create("vit", tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.ckpt"])
def test_torchs_zip_is_refused_whatever_its_name(name: str, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=REFUSED):
        create("vit", tmp_path / name)


def test_an_old_text_pickle_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(_Bomb(tmp_path / "boom"), protocol=0))
    with pytest.raises(ValueError, match="no complete safetensors file"):
        create("vit", path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "length", [128, 384, 640, 896, 1152, 1408, int.from_bytes(b"PK", "little")]
)
def test_a_header_length_that_looks_like_a_pickle_is_none(length: int, tmp_path):
    """128 + 256 p starts with the bytes 80 0p, and 19280 with PK."""
    path = tmp_path / "model.safetensors"
    values = {"a": np.arange(3, dtype="float32")}
    save_file(values, path, metadata={"x": ""})
    missing = length - int.from_bytes(path.read_bytes()[:8], "little")
    while True:
        save_file(values, path, metadata={"x": "." * max(missing, 0)})
        found = int.from_bytes(path.read_bytes()[:8], "little")
        if found == length:
            break
        missing += length - found
    with weights.read_safetensors(path) as file:
        assert np.array_equal(file.read("a"), values["a"])


# --- Contents that do not fit -----------------------------------------------------------------


def rewrite(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)


def test_missing_keys_are_named(saved):
    _, path = saved
    rewrite(path, lambda t: [t.pop(k) for k in ("blocks.1.mlp.fc2.bias", "cls_token")])
    with pytest.raises(
        ValueError, match=r"do not fit.*Missing in the source: blocks.1.mlp.fc2.bias, cls_token"
    ):
        create("vit", path)


def test_surplus_keys_are_named(saved):
    _, path = saved
    rewrite(path, lambda t: t.update({"blocks.2.norm1.weight": np.ones(32, "float32")}))
    with pytest.raises(ValueError, match=r"Not in the model: blocks.2.norm1.weight"):
        create("vit", path)


def test_many_missing_keys_are_counted(saved):
    _, path = saved
    with pytest.raises(ValueError, match=r"Missing in the source: .*and 7 more"):
        create("vit", path, depth=3)


def test_a_norm_in_another_place_says_which_field(saved):
    _, path = saved
    with pytest.raises(ValueError, match=r"normalisation is in another place: pass fc_norm="):
        create("vit", path, global_pool="avg")
    assert create("vit", path, global_pool="avg", fc_norm=False).norm is not None


def test_shape_mismatch_names_the_weight(saved):
    _, path = saved
    rewrite(path, lambda t: t.update({"blocks.0.mlp.fc1.bias": np.ones(7, "float32")}))
    with pytest.raises(
        ValueError, match=r"model.safetensors: Weight 'blocks.0.mlp.fc1.bias' has shape \(7,\).*128"
    ):
        create("vit", path)
    with pytest.raises(ValueError, match=r"shape .* in the source .*another architecture or conf"):
        create("vit", path, mlp_ratio=2.0)


def test_the_wrong_model_is_explained(saved):
    _, path = saved
    with pytest.raises(ValueError, match=r"do not fit the model.*Check the model's name"):
        create("convnext", path)


# --- What is adapted --------------------------------------------------------------------------


@both
def test_fresh_head_keeps_everything_else(kind: str, tmp_path):
    model = tiny_model(kind)
    path = models.save_safetensors(model, tmp_path / "model.safetensors")
    loaded = create(kind, path, nb_classes=3)
    head = model.cfg.classifier.replace(".", "/") + "/"
    for name, value in values(loaded).items():
        if name.startswith(head):
            assert 3 in value.shape
        else:
            assert np.array_equal(value, values(model)[name]), name
    headless = create(kind, path, nb_classes=0)
    assert set(values(headless)) == {n for n in values(model) if not n.startswith(head)}
    # And back: a file without head, a model with one.
    path = models.save_safetensors(headless, tmp_path / "headless.safetensors")
    assert create(kind, path, nb_classes=4).cfg.nb_classes == 4


def test_a_file_without_head_gives_a_model_without(tmp_path):
    path = models.save_safetensors(tiny_model(nb_classes=0), tmp_path / "model.safetensors")
    fields = {k: v for k, v in TINY["vit"][1].items() if k != "nb_classes"}
    model = tfimm_lora.create_model("vit_tiny_patch16_224", model_path=path, **fields)
    assert model.cfg.nb_classes == 0 and model.head is None


@both
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_grey_images_are_seen_alike_whatever_the_channels(kind: str, channels: int, tmp_path):
    model = tiny_model(kind)
    path = models.save_safetensors(model, tmp_path / "model.safetensors")
    adapted = create(kind, path, in_channels=channels)
    grey = np.random.default_rng(0).standard_normal((2, *model.cfg.input_size, 1)).astype("float32")
    # Repeated channels share the kernels in turn: three of them give the grey response exactly,
    # others its share; one channel always exactly.
    stem = "patch_embed.proj" if kind == "vit" else "stem.0"
    kernel = values(adapted)[stem.replace(".0", "_0").replace(".", "/") + "/kernel"]
    source = values(model)[stem.replace(".0", "_0").replace(".", "/") + "/kernel"]
    if channels == 1:
        np.testing.assert_allclose(
            numpy(adapted(grey)), numpy(model(np.repeat(grey, 3, -1))), rtol=1e-3, atol=1e-4
        )
    else:
        for c in range(channels):
            np.testing.assert_allclose(
                kernel[:, :, c], source[:, :, c % 3] * 3 / channels, rtol=1e-6
            )


def test_position_table_is_resized_and_nothing_else(tmp_path):
    model = tiny_model("vit")
    path = models.save_safetensors(model, tmp_path / "model.safetensors")
    larger = create("vit", path, input_size=(32, 40))
    assert values(larger)["pos_embed"].shape == (1, 1 + 4 * 5, 32)
    before, after = values(model), values(larger)
    assert np.array_equal(after["pos_embed"][:, 0], before["pos_embed"][:, 0])
    assert all(np.array_equal(after[n], before[n]) for n in before if n != "pos_embed")
    assert np.isfinite(numpy(larger(images(larger)))).all()


def test_patch_kernel_is_resized(tmp_path):
    path = models.save_safetensors(tiny_model("vit"), tmp_path / "model.safetensors")
    finer = create("vit", path, patch_size=4, input_size=(8, 8))
    assert values(finer)["patch_embed/proj/kernel"].shape == (4, 4, 3, 32)


def test_table_that_cannot_be_a_grid_is_refused(saved):
    _, path = saved
    rewrite(path, lambda t: t.update(pos_embed=np.ones((1, 8, 32), "float32")))
    with pytest.raises(ValueError, match=r"'pos_embed' has shape \(1, 8, 32\)"):
        create("vit", path)


# --- Local folders in timm's hub layout -------------------------------------------------------


def folder_of(model: keras.Model, folder, **config):
    folder.mkdir(exist_ok=True)
    models.save_safetensors(model, folder / "model.safetensors")
    size = [model.cfg.in_channels, *model.cfg.input_size]
    facts = {"architecture": model.cfg.name, "num_classes": model.cfg.nb_classes, **config}
    facts["pretrained_cfg"] = {"tag": "mine", "input_size": size, "mean": [0.1, 0.2, 0.3],
                               "std": [1, 1, 1], "first_conv": model.cfg.first_conv,
                               "classifier": model.cfg.classifier}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@both
def test_pretrained_folder(kind: str, tmp_path):
    model = tiny_model(kind)
    folder = folder_of(model, tmp_path / "mine")
    name, overrides = TINY[kind]
    inner = {k: v for k, v in overrides.items() if k not in ("nb_classes", "input_size")}
    loaded = tfimm_lora.create_model(name, pretrained=str(folder), **inner)
    assert_same_bits(values(loaded), values(model))
    assert loaded.cfg.nb_classes == 10 and loaded.cfg.input_size == model.cfg.input_size
    assert loaded.pretrained_cfg.mean == (0.1, 0.2, 0.3)
    assert loaded.pretrained_cfg.tag == "mine"
    fresh = lora.create_model(name, pretrained=str(folder), nb_classes=2, **inner)
    assert any(v.path.endswith("bias") for v in fresh.trainable_weights)
    kept = lora.create_model(name, pretrained=str(folder), **inner)
    assert all("_lora_" in v.path for v in kept.trainable_weights)


def test_folders_that_are_none(tmp_path):
    name, fields = TINY["vit"]
    with pytest.raises(FileNotFoundError, match=r"there is no such folder. .*model_path=FILE"):
        tfimm_lora.create_model(name, pretrained=str(tmp_path / "nothing"), **fields)
    folder = folder_of(tiny_model(), tmp_path / "mine")
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(FileNotFoundError, match=r"has no config.json. A pretrained folder holds"):
        tfimm_lora.create_model(name, pretrained=str(folder), **fields)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a timm config.json: it cannot be read as JSON"):
        tfimm_lora.create_model(name, pretrained=str(folder), **fields)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a timm config.json with a field 'architecture'"):
        tfimm_lora.create_model(name, pretrained=str(folder), **fields)
    (folder / "config.json").write_text('{"architecture": "convnext_tiny"}')
    with pytest.raises(
        ValueError, match=r"holds weights of 'convnext_tiny', not of 'vit_.*create_model\('convnext"
    ):
        tfimm_lora.create_model(name, pretrained=str(folder), **fields)
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        tfimm_lora.create_model(name, pretrained=str(folder), **fields)


# --- Writing ----------------------------------------------------------------------------------


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(aside):
        aside.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_aside(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_written_files_have_the_usual_permissions(tmp_path):
    path = write_safetensors(tmp_path / "deep" / "a.safetensors", {"a": np.ones(2)}, {})
    other = tmp_path / "b"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
