"""Feature maps of several depths: which, of what shape, saved, adapted and trained."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    TINY,
    answer_of,
    assert_same_bits,
    gradients,
    images,
    numpy,
    randomize,
    relative_error,
    tiny_lora_model,
    tiny_model,
    values,
)
from tfimm_lora import lora
from tfimm_lora.architectures.base import ImageModel
from tfimm_lora.architectures.features import FeatureInfo, take_indices
from tfimm_lora.models import FeatureExtractor, create_feature_extractor, registry, save_safetensors
from tfimm_lora.weights import read_safetensors

both = pytest.mark.parametrize("kind", ["vit", "convnext"])


def fields_of(kind: str) -> tuple[str, dict]:
    """A small model's name and fields, without a number of classes."""
    name, fields = TINY[kind]
    return name, {k: v for k, v in fields.items() if k != "nb_classes"}


def tiny_extractor(kind: str, create=tfimm_lora.create_model, **more) -> FeatureExtractor:
    """An extractor with random, non-trivial weights."""
    name, fields = fields_of(kind)
    return randomize(create(name, features_only=True, **{**fields, **more}))


def assert_same_maps(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(numpy(a), numpy(b))


def trained(model: keras.Model) -> list[str]:
    return sorted(v.path.split("/", 1)[1] for v in model.trainable_variables)


# --- Which maps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (None, (0, 1, 2, 3, 4)),
        (2, (3, 4)),
        (np.int64(1), (4,)),
        ([0, -1], (0, 4)),
        ((3, 1), (1, 3)),
        ([-5], (0,)),
    ],
)
def test_choices(indices, expected):
    assert take_indices(5, indices) == expected


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, "out_indices=0 asks for the last 0 features; choose 1 to 2"),
        (3, "out_indices=3 asks for the last 3 features; choose 1 to 2"),
        ([2], "no feature 2. The 2 features are numbered 0 to 1, or -2 to -1"),
        ([-3], "no feature -3. The 2 features are numbered 0 to 1"),
        ([0, -2], r"each once, found \[0, -2\]"),
        ([], r"one feature or more, each once, found \[\]"),
        ([0.5], "an integer, a list of integers or None, found 0.5"),
        ("last", "an integer, a list of integers or None, found 'last'"),
    ],
)
def test_bad_choices_name_the_range(indices, message):
    with pytest.raises(ValueError, match=message):
        create_feature_extractor(tiny_model("vit"), indices)


@both
def test_maps_are_those_of_the_model(kind: str):
    model = tiny_model(kind)
    x = images(model)
    _, features = model(x, return_features=True)
    extractor = create_feature_extractor(model, [0, -1])
    if kind == "vit":
        expected = [features[f"block_{i}"][:, 1:] for i in (0, 1)]
        expected = [keras.ops.reshape(t, (3, 2, 2, 32)) for t in expected]
    else:
        expected = [features[f"stage_{i}/block_0"] for i in (0, 3)]
    assert_same_maps(extractor(x), expected)
    assert isinstance(extractor(x), list)


@both
def test_info_is_that_of_the_maps(kind: str):
    model = tiny_model(kind)
    x = images(model)
    extractor = create_feature_extractor(model, [0, -1])
    info = extractor.feature_info
    assert isinstance(info, FeatureInfo)
    shapes = [(3, *(s // r for s in model.cfg.input_size), c)
              for c, r in zip(info.channels(), info.reduction(), strict=True)]  # fmt: skip
    assert [tuple(maps.shape) for maps in extractor(x)] == shapes
    assert extractor.compute_output_shape(x.shape) == shapes
    assert extractor.compute_output_shape((None, *x.shape[1:])) == [(None, *s[1:]) for s in shapes]
    stem, last = ("blocks", 1) if kind == "vit" else ("stages", 3)
    assert info.module_name() == [f"{stem}.0", f"{stem}.{last}"]
    assert len(info) == last + 1 and info[0] == info.get_dicts()[0]
    assert info.channels(last) == info.channels([last])[0] == info.channels()[-1]
    assert [f["index"] for f in info] == list(range(last + 1))


def test_default_maps():
    assert tiny_extractor("vit", depth=5).out_indices == (2, 3, 4)
    assert tiny_extractor("vit").out_indices == (0, 1)
    convnext = tiny_extractor("convnext")
    assert convnext.feature_info.reduction() == [4, 8, 16, 32]
    assert convnext.feature_info.channels() == [8, 16, 24, 32]
    assert tiny_extractor("convnext", patch_size=2).feature_info.reduction() == [4, 8, 16, 32]
    assert tiny_extractor("convnext", out_indices=2).out_indices == (2, 3)


def test_intermediates_of_a_vit():
    model = tiny_model("vit", reg_tokens=3)
    x = images(model)
    final, maps = model.forward_intermediates(x)
    assert np.array_equal(numpy(final), numpy(model.forward_features(x)))
    assert [tuple(m.shape) for m in maps] == [(3, 2, 2, 32)] * 2
    normed = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert np.array_equal(numpy(normed[0]).reshape(3, 4, 32), numpy(final)[:, 4:])
    ((maps, prefix),) = model.forward_intermediates(
        x, 1, norm=True, intermediates_only=True, return_prefix_tokens=True
    )
    assert np.array_equal(numpy(prefix), numpy(final)[:, :4])
    assert np.array_equal(numpy(maps), numpy(normed[0]))
    early, _ = model.forward_intermediates(x, [0], stop_early=True)
    block = model(x, return_features=True)[1]["block_0"]
    assert relative_error(early, model.norm(block)) <= 1e-6


def test_norm_of_a_convnext_is_for_the_last_map_only():
    model = tiny_model("convnext", head_norm_first=True)
    x = images(model)
    plain, normed = (create_feature_extractor(model, [2, 3], norm=n)(x) for n in (False, True))
    assert np.array_equal(numpy(plain[0]), numpy(normed[0]))
    assert relative_error(normed[1], model.norm_pre(plain[1])) <= 1e-6
    assert relative_error(normed[1], plain[1]) > 0.1
    final, _ = model.forward_intermediates(x)
    assert np.array_equal(numpy(final), numpy(model.forward_features(x)))


@both
def test_what_is_behind_the_last_map_is_not_run(kind: str, monkeypatch):
    model = tiny_model(kind)
    x = images(model)
    expected = [numpy(maps) for maps in create_feature_extractor(model, [0])(x)]

    def fail(*args, **kwargs):
        raise AssertionError("not needed")

    blocks = model.blocks if kind == "vit" else model.stages
    for layer in (*blocks[1:], model.head):
        monkeypatch.setattr(layer, "call", fail)
    assert_same_maps(create_feature_extractor(model, [0])(x), expected)


def test_other_sizes_give_other_grids():
    vit = tiny_extractor("vit", dynamic_img_size=True, out_indices=1)
    (maps,) = vit(np.ones((2, 32, 24, 3), "float32"))
    assert maps.shape == (2, 4, 3, 32)
    assert vit.compute_output_shape((None, 32, 24, 3)) == [(None, 4, 3, 32)]
    convnext = tiny_extractor("convnext", out_indices=[0, 3])
    maps = convnext(np.ones((2, 64, 97, 3), "float32"))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 24, 8), (2, 2, 3, 32)]
    with pytest.raises(ValueError, match=r"got about \(32, 24\)"):
        tiny_extractor("vit")(np.ones((2, 32, 24, 3), "float32"))


# --- Creating ---------------------------------------------------------------------------------


@both
def test_weights_come_from_the_same_files(kind: str, tmp_path):
    name, fields = fields_of(kind)
    model = tiny_model(kind)
    x = images(model)
    save_safetensors(model, tmp_path / "model.safetensors")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    create_feature_extractor(model, [0]).save(tmp_path / "extractor.keras")
    expected = create_feature_extractor(model, [0, 1])(x)
    for file in ("model.safetensors", "model.keras", "extractor.keras", "model.weights.h5"):
        more = {"nb_classes": 10} if file.endswith(".h5") else {}
        found = tfimm_lora.create_model(
            name, model_path=tmp_path / file, features_only=True, out_indices=[0, 1],
            **fields, **more,
        )  # fmt: skip
        assert_same_maps(found(x), expected)
        assert found.cfg.nb_classes == more.get("nb_classes", 0)
    adapted = lora.create_model(
        name, model_path=tmp_path / "model.safetensors", features_only=True,
        out_indices=[0, 1], **fields,
    )  # fmt: skip
    assert_same_maps(adapted(x), expected)


@both
def test_weights_that_no_map_needs_are_frozen(kind: str):
    more = {"global_pool": "map"} if kind == "vit" else {"head_norm_first": True}
    extractor = tiny_extractor(kind, out_indices=[0], **more)
    x = images(extractor.backbone)
    reached = {p for p, g in gradients(_Sum(extractor), x).items() if g is not None}
    frozen = {"norm_pre", "head", "stages_1", "stages_2", "stages_3"}
    frozen |= {"blocks_1", "attn_pool", "norm"}
    for path in values(extractor.backbone):
        assert (f"extractor/{extractor.backbone.name}/{path}" in reached) == (
            path.split("/")[0] not in frozen
        ), path
    assert len(trained(extractor)) == len(reached)


class _Sum(keras.Model):
    """The first map, as a model."""

    def __init__(self, extractor) -> None:
        super().__init__()
        extractor.name = "extractor"
        self.extractor = extractor

    def call(self, x, training=None):
        return self.extractor(x, training=training)[0]


def test_wrapping_changes_no_flags():
    model = tiny_lora_model("vit", lora_train_classifier=True)
    before = {v.path: v.trainable for v in model.variables}
    extractor = create_feature_extractor(model, [0])
    assert {v.path: v.trainable for v in model.variables} == before
    assert extractor.backbone is model
    assert [v.path for v in extractor.variables] == [v.path for v in model.variables]


def test_refused():
    name, fields = fields_of("vit")
    with pytest.raises(ValueError, match=r"out_indices=\[0\] needs features_only=True"):
        tfimm_lora.create_model(name, out_indices=[0], **fields)
    with pytest.raises(ValueError, match=r"out_indices=\[0\] needs features_only=True"):
        lora.create_model(name, out_indices=[0], **fields)
    with pytest.raises(ValueError, match="without classifier, and nb_classes=5"):
        tfimm_lora.create_model(name, features_only=True, num_classes=5, **fields)
    extractor = tiny_extractor("vit")
    with pytest.raises(ValueError, match=r"extractor already. Pass its \.backbone"):
        create_feature_extractor(extractor)
    with pytest.raises(ValueError, match=r"Sequential has no feature maps.*forward_intermediates"):
        create_feature_extractor(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    model = tiny_model("vit")
    with pytest.raises(ValueError, match="is not built"):
        create_feature_extractor(type(model)(model.cfg))


def test_a_registered_class_without_maps_says_what_it_lacks(monkeypatch):
    class Plain(ImageModel):
        pass

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @tfimm_lora.register_model
    def plain_without_maps():
        return Plain, tfimm_lora.ModelConfig(name="plain_without_maps")

    with pytest.raises(ValueError, match=r"Plain has no feature maps.* feature_info, forward_"):
        tfimm_lora.create_model("plain_without_maps", features_only=True)


# --- Inside other models, saved, trained --------------------------------------------------------


def pooled_classifier(extractor: FeatureExtractor) -> keras.Model:
    """A functional model that classifies by all maps."""
    inputs = keras.Input((*extractor.cfg.input_size, 3))
    pooled = [keras.layers.GlobalAveragePooling2D()(maps) for maps in extractor(inputs)]
    model = keras.Model(inputs, keras.layers.Dense(4, name="top")(
        keras.layers.Concatenate()(pooled)
    ))  # fmt: skip
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@both
def test_symbolic_calls(kind: str):
    extractor = tiny_extractor(kind)
    size = extractor.cfg.input_size
    outputs = extractor(keras.Input((*size, 3)))
    assert [tuple(t.shape) for t in outputs] == extractor.compute_output_shape((None, *size, 3))
    assert {t.dtype for t in outputs} == {"float32"}
    x = images(extractor.backbone)
    for compiled, eager in zip(extractor.predict(x, verbose=0), extractor(x), strict=True):
        assert relative_error(compiled, eager) <= 1e-5


def test_a_convnext_of_open_size():
    maps = tiny_extractor("convnext")(keras.Input((None, None, 3)))
    assert [tuple(t.shape) for t in maps] == [(None, None, None, c) for c in (8, 16, 24, 32)]


@both
@pytest.mark.parametrize("adapted", [False, True])
def test_files(kind: str, adapted: bool, tmp_path):
    create = lora.create_model if adapted else tfimm_lora.create_model
    extractor = tiny_extractor(kind, create, out_indices=[0, 1])
    x = images(extractor.backbone)
    extractor.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is FeatureExtractor and type(again.backbone) is type(extractor.backbone)
    assert again.cfg == extractor.cfg
    assert again.pretrained_cfg == extractor.pretrained_cfg
    assert_same_bits(values(again), values(extractor))
    assert_same_maps(again(x), extractor(x))
    assert trained(again) == trained(extractor)
    extractor.save_weights(tmp_path / "model.weights.h5")
    name, fields = fields_of(kind)
    third = create(name, features_only=True, out_indices=[0, 1], **fields)
    third.load_weights(tmp_path / "model.weights.h5")
    assert_same_maps(third(x), extractor(x))


@both
def test_training_moves_the_adapters_and_survives_saving(kind: str, tmp_path):
    base = tiny_lora_model(kind, lora_rank=2, lora_train_classifier=False)
    model = pooled_classifier(create_feature_extractor(base))
    assert len(trained(model)) == 2 * len(lora.lora_layers(base)) + 2
    before = values(model)
    x, y = images(base, batch=8), np.arange(8) % 4
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    moved = {p for p, v in values(model).items() if not np.array_equal(v, before[p])}
    assert moved == {p for p in before if "lora" in p or p.startswith("top/")}
    # The whole model has changed with it, and is what it was in a file.
    assert {p.split("/", 2)[2] for p in moved if "lora" in p} == {
        p for p in values(base) if "lora" in p
    }
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(values(again), values(model))
    assert trained(again) == trained(model)
    for m in (model, again):
        m.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    for path, value in values(again).items():
        assert np.abs(value - values(model)[path]).max() <= 1e-6, path


@both
def test_to_lora_and_back(kind: str):
    extractor = tiny_extractor(kind, out_indices=[0, 1])
    x = images(extractor.backbone)
    adapted = lora.convert_to_lora_model(extractor, lora_rank=2)
    assert type(adapted) is FeatureExtractor and adapted.out_indices == (0, 1)
    assert_same_maps(adapted(x), extractor(x))
    randomize(adapted, 2, only="lora")
    changed = [numpy(maps) for maps in adapted(x)]
    assert relative_error(changed[-1], extractor(x)[-1]) > 1e-2
    regular = lora.convert_to_regular_model(adapted)
    assert not lora.lora_layers(regular)
    for a, b in zip(regular(x), changed, strict=True):
        assert relative_error(a, b) <= 1e-5
    lora.merge_lora_weights(adapted)
    for a, b in zip(adapted(x), changed, strict=True):
        assert relative_error(a, b) <= 1e-5
    lora.unmerge_lora_weights(adapted)
    assert_same_maps(adapted(x), changed)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lora.convert_to_lora_model(adapted)
    with pytest.raises(ValueError, match="has no LoRA layers"):
        lora.convert_to_regular_model(extractor)


@both
def test_adapters_are_those_of_the_backbone(kind: str, tmp_path):
    extractor = tiny_extractor(kind)
    x = images(extractor.backbone)
    adapted = lora.convert_to_lora_model(extractor, lora_rank=2)
    randomize(adapted, 4, only="lora")
    files = []
    for name, model in [("extractor", adapted), ("backbone", adapted.backbone)]:
        lora.save_adapter(model, tmp_path / name)
        with read_safetensors(tmp_path / name / "adapter_model.safetensors") as file:
            files.append((file.metadata, {key: file.read(key) for key in file.shapes}))
    assert files[0][0] == files[1][0]
    assert_same_bits(files[0][1], files[1][1])
    loaded = lora.load_adapter(extractor, tmp_path / "extractor")
    assert_same_maps(loaded(x), adapted(x))
    randomize(loaded, 5, only="lora")
    assert lora.load_adapter(loaded, tmp_path / "backbone") is loaded
    assert_same_maps(loaded(x), adapted(x))


def test_mixed_precision_is_the_backbones(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = tiny_model("vit")
    keras.config.set_dtype_policy("float32")  # the extractor is not asked
    extractor = create_feature_extractor(model)
    assert {keras.backend.standardize_dtype(m.dtype) for m in extractor(images(model))} == {
        "bfloat16"
    }
    assert {t.dtype for t in extractor(keras.Input((16, 16, 3)))} == {"bfloat16"}
    extractor.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("mixed_bfloat16")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_maps(again(images(model)), extractor(images(model)))


# --- The other backend --------------------------------------------------------------------------

OTHER_BACKEND = """
import json, sys
import keras, numpy as np
import tfimm_lora
answers = {"backend": keras.backend.backend()}
for kind in ("vit", "convnext"):
    model = keras.saving.load_model(f"{sys.argv[1]}/{kind}.keras")
    x = np.load(f"{sys.argv[1]}/{kind}.npy")
    outputs = model.predict(x, verbose=0)
    (extractor,) = [la for la in model.layers if type(la).__name__ == "FeatureExtractor"]
    before = {v.path: np.array(v.value) for v in extractor.variables}
    model.fit(x, np.arange(len(x)) % 4, verbose=0)
    moved = [v.path for v in extractor.variables
             if not np.array_equal(np.array(v.value), before[v.path])]
    symbolic = extractor(keras.Input(x.shape[1:]))
    answers[kind] = [outputs.tolist(), [list(t.shape) for t in symbolic], sorted(moved)]
print(json.dumps(answers))
"""


def test_trained_extractors_in_the_other_backend(tmp_path):
    other = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]
    if other == "jax":
        pytest.importorskip("jax", reason="jax comes with the extra 'jax'")
    expected = {}
    for kind in ("vit", "convnext"):
        base = tiny_lora_model(kind, lora_rank=2, lora_train_classifier=False)
        extractor = create_feature_extractor(base, [0, 1])
        model, x = pooled_classifier(extractor), images(base, batch=4)
        model.save(tmp_path / f"{kind}.keras")
        np.save(tmp_path / f"{kind}.npy", x)
        needed = ("blocks_", "stages_0", "stages_1")
        expected[kind] = (
            model.predict(x, verbose=0),
            [list(s) for s in extractor.compute_output_shape((None, *x.shape[1:]))],
            sorted(v.path for v in base.variables
                   if "lora" in v.path and v.path.split("/")[1].startswith(needed)),
        )  # fmt: skip
    answers = answer_of(OTHER_BACKEND, tmp_path, KERAS_BACKEND=other)
    assert answers.pop("backend") == other
    assert answers.keys() == expected.keys()
    for kind, (outputs, shapes, moved) in answers.items():
        assert relative_error(outputs, expected[kind][0]) <= 1e-4
        assert (shapes, moved) == expected[kind][1:]
