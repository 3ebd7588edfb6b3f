"""Foreign checkpoints: what is recognised, and what a broken or unknown one says.

What the formats mean is compared with timm and transformers in ``parity``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tfimm_lora
from tests.helpers import TINY, assert_same_bits, tiny_model, values
from tfimm_lora import models
from tfimm_lora.weights.foreign import (
    FORMATS,
    described,
    formats_of,
    in_timm_names,
    known_formats,
    recognised,
)
from tfimm_lora.weights.foreign.unwrap import unwrapped
from tfimm_lora.weights.foreign.view import TranslatedFile, Translation, below, fuse_qkv, renamed
from tfimm_lora.weights.safetensors_file import read_safetensors

VIT, CONVNEXT = (models.model_config(name) for name in ("vit_tiny_patch16_224", "convnext_tiny"))


@dataclasses.dataclass
class Memory:
    """Tensors in memory with the interface of a file."""

    tensors: dict[str, np.ndarray]
    path: Path = Path("memory.safetensors")
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        return value


def memory(**shapes: tuple[int, ...]) -> Memory:
    return Memory({n.replace("__", "."): np.ones(s, "float32") for n, s in shapes.items()})


@pytest.fixture
def saved(tmp_path):
    """A tiny ViT and its file; ``rewrite`` changes the tensors in it."""
    model = tiny_model("vit")
    path = models.save_safetensors(model, tmp_path / "model.safetensors")

    def rewrite(change) -> Path:
        tensors = change(load_file(path))
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
        return path

    return model, rewrite


def create(path: Path, **fields: Any) -> Any:
    name, overrides = TINY["vit"]
    return tfimm_lora.create_model(name, model_path=path, **{**overrides, **fields})


# --- Recognising ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_timms_names_are_not_foreign(kind: str):
    model = tiny_model(kind)
    shapes = {n: tuple(v.shape) for n, v in values(model).items()}
    assert recognised(shapes, model.cfg) is None
    file = Memory({n: np.zeros(s) for n, s in shapes.items()})
    assert in_timm_names(file, model.cfg) is file
    assert described(file) == "memory.safetensors"


def test_titles_tell_formats_apart():
    for formats in FORMATS.values():
        titles = [f.title for f in formats]
        assert len(titles) == len(set(titles))
        assert all(title and not title.endswith(".") for title in titles)
    assert formats_of(None) == () and known_formats(None) == ""


def test_models_of_users_have_no_foreign_formats():
    file = memory(visual__class_embedding=(4,))
    assert in_timm_names(file, object()) is file


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["model.module.cls_token", "epoch"], {"cls_token": "model.module.cls_token"}),
        (["module.a", "module.b.c"], {"a": "module.a", "b.c": "module.b.c"}),
        (["state_dict.model.a", "optimizer.x", "step"], {"a": "state_dict.model.a"}),
        (["timm_model.head.weight"], {"head.weight": "timm_model.head.weight"}),
        # What not all names have is no prefix, and then nothing is left out.
        (["module.a", "b", "epoch"], {"module.a": "module.a", "b": "b", "epoch": "epoch"}),
        (["modules.a"], {"modules.a": "modules.a"}),
        ([], {}),
        (["epoch"], {"epoch": "epoch"}),
    ],
)
def test_prefixes_of_training_frameworks(names: list[str], bare: dict[str, str]):
    assert unwrapped(names) == bare


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "state_dict.model."])
def test_a_wrapped_checkpoint_loads(prefix: str, saved):
    model, rewrite = saved
    path = rewrite(lambda t: {**{prefix + k: v for k, v in t.items()}, "epoch": np.ones(1)})
    assert_same_bits(values(create(path)), values(model))


# --- Reading ----------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    asked = []

    class Counting(Memory):
        def read(self, name: str) -> np.ndarray:
            asked.append(name)
            return super().read(name)

    parts = {f"blocks.0.attn.{p}.weight": np.full((2, 2), i) for i, p in enumerate("qkv")}
    file = Counting({**parts, "other": np.zeros(3)})
    to = Translation(file.shapes)
    to.keep_all(fuse_qkv(to, {name: name for name in file.shapes}))
    view = TranslatedFile(file, to, "a test")
    assert view.shapes == {"blocks.0.attn.qkv.weight": (6, 2), "other": (3,)}
    assert asked == []
    assert view.read("blocks.0.attn.qkv.weight")[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert asked == list(parts)


def test_recipes_know_their_shapes_before():
    to = Translation({"a": (4, 6), "b": (2, 6), "token": (3,)})
    to.slice("rows", "a", 0, 1)
    to.slice("columns", "a", axis=1, start=2, stop=4)
    to.transpose("turned", "a")
    to.concatenate("joined", ["a", "b"])
    to.reshape("unit", "token", (1, 1, 3))
    to.reshape("impossible", "token", (1, 2))
    to.fill("zero", (5,), 0.0)
    file = Memory({"a": np.arange(24.0).reshape(4, 6), "b": np.ones((2, 6)), "token": np.ones(3)})
    view = TranslatedFile(file, to, "a test")
    for name, shape in view.shapes.items():
        assert view.read(name).shape == shape, name
    assert view.read("columns").tolist() == file.tensors["a"][:, 2:4].tolist()
    assert view.shapes["impossible"] == (3,)  # so that the loader names it
    assert described(view) == "memory.safetensors, read as a test,"


def test_names():
    assert renamed(["x.norm_1.bias"], [(r"norm_(\d)", r"norm\1"), ("^x", "y")]) == {
        "y.norm1.bias": "x.norm_1.bias"
    }
    assert below(["a.b", "b.a"], "a.") == {"b": "a.b"}


# --- Broken files -----------------------------------------------------------------------------


def hf_vit(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A tiny ViT's tensors under the names of transformers."""
    rules = [
        (r"^(cls_token|pos_embed)$", r"embeddings.\1"),
        (r"pos_embed$", "position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
    ]
    found = {new: tensors[old] for new, old in renamed(tensors, rules).items()}
    for name in [n for n in found if ".attn.qkv." in n]:
        parts = np.split(found.pop(name), 3)
        for part, value in zip(("query", "key", "value"), parts, strict=True):
            found[name.replace("attn.qkv", f"attention.attention.{part}")] = value
    return found


def test_transformers_names_of_the_tests_are_right(saved):
    model, rewrite = saved
    assert_same_bits(values(create(rewrite(hf_vit))), values(model))


def test_a_missing_part_is_named_with_the_format(saved):
    _, rewrite = saved

    def without_key(tensors):
        found = hf_vit(tensors)
        del found["encoder.layer.1.attention.attention.key.weight"]
        return found

    with pytest.raises(
        ValueError,
        match=r"looks like ViT, DeiT, I-JEPA or ViT-MAE of transformers, but it lacks "
        r"blocks.1.attn.k.weight, which 'blocks.1.attn.qkv.weight' is made of",
    ):
        create(rewrite(without_key))


def test_a_missing_and_a_surplus_tensor_are_named(saved):
    _, rewrite = saved

    def changed(tensors):
        found = hf_vit(tensors)
        found["adapter.weight"] = found.pop("encoder.layer.0.output.dense.bias")
        return found

    with pytest.raises(
        ValueError,
        match=r"read as ViT, .* of transformers, do not fit the model. Missing in the source: "
        r"blocks.0.mlp.fc2.bias. Not in the model: adapter.weight",
    ):
        create(rewrite(changed))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            memory(radio_model__model__patch_generator__embedder__weight=(8,)),
            "looks like RADIO of NVIDIA, but a tensor has fewer axes than there",
        ),
        (
            memory(patch_embed__proj__weight=(8, 3, 4, 4), register_tokens=(1, 4, 8),
                   cls_token=(1, 1, 8)),
            "looks like DINOv2 of Meta, but it lacks pos_embed, which 'cls_token' is made of",
        ),
    ],
)  # fmt: skip
def test_broken_files_of_known_formats(file: Memory, message: str):
    with pytest.raises(ValueError, match=f"memory.safetensors {message}"):
        in_timm_names(file, VIT)


def test_a_scalar_where_the_classifier_should_be(saved):
    _, rewrite = saved
    path = rewrite(lambda t: {**t, "head.weight": np.ones(())})
    with pytest.raises(ValueError, match="has a classifier of 1 classes and the model one of 1000"):
        tfimm_lora.create_model(
            TINY["vit"][0], model_path=path,
            **{k: v for k, v in TINY["vit"][1].items() if k != "nb_classes"},
        )  # fmt: skip


def test_tensors_that_cannot_be_put_together():
    parts = {f"blocks.0.attn.{p}.weight": np.ones((2, 2 + i)) for i, p in enumerate("qkv")}
    file = Memory(parts)
    to = Translation(file.shapes)
    fuse_qkv(to, {name: name for name in parts})
    with pytest.raises(
        ValueError,
        match=r"memory.safetensors, read as a test: 'blocks.0.attn.qkv.weight' cannot be made of "
        r"blocks.0.attn.q.weight, blocks.0.attn.k.weight, blocks.0.attn.v.weight: all the input",
    ):
        TranslatedFile(file, to, "a test").read("blocks.0.attn.qkv.weight")


def test_unknown_names_list_what_is_read(saved):
    _, rewrite = saved
    path = rewrite(lambda t: {f"backbone.layer.{k}": v for k, v in t.items()})
    with pytest.raises(ValueError, match=r"Apart from timm's names, these are read: .*") as error:
        create(path)
    for form in formats_of(VIT):
        assert form.title in str(error.value)
    with read_safetensors(path) as file:
        assert in_timm_names(file, VIT) is file


def test_formats_of_other_families_are_not_listed():
    assert "DINOv2" in known_formats(VIT) and "DINOv2" not in known_formats(CONVNEXT)
    assert "ConvNeXt of Meta" in known_formats(CONVNEXT)
