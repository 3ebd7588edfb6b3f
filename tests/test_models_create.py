"""create_model: overrides, outputs, features, and what it refuses."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

import tfimm_lora
from tests.helpers import TINY, images, numpy, relative_error, tiny_model, values
from tfimm_lora.architectures import ViTConfig

both = pytest.mark.parametrize("kind", ["vit", "convnext"])

# --- Configuration ----------------------------------------------------------------------------


@both
def test_overrides_reach_the_config_and_the_layers(kind: str):
    model = tiny_model(kind, nb_classes=7, in_channels=4, drop_path_rate=0.2)
    assert (model.cfg.nb_classes, model.cfg.in_channels) == (7, 4)
    assert model.cfg.drop_path_rate == 0.2
    assert model.built
    assert model(model.dummy_inputs).shape == (1, 7)
    assert type(model.cfg) is type(model).cfg_class
    assert model.pretrained_cfg.architecture == TINY[kind][0]


@both
def test_timm_spellings_mean_the_same(kind: str):
    name, overrides = TINY[kind]
    rest = {k: v for k, v in overrides.items() if k not in ("nb_classes", "input_size")}
    size = overrides["input_size"]
    timm = tfimm_lora.create_model(name, num_classes=6, in_chans=1, img_size=size, **rest)
    ours = tfimm_lora.create_model(name, nb_classes=6, in_channels=1, input_size=size, **rest)
    assert timm.cfg == ours.cfg
    assert values(timm).keys() == values(ours).keys()
    square = tfimm_lora.create_model(name, img_size=size[0], **rest)
    assert square.cfg.input_size == size


def test_spelled_twice_is_refused():
    with pytest.raises(ValueError, match="'nb_classes' was given twice, once under timm's"):
        tfimm_lora.create_model("convnext_tiny", nb_classes=3, num_classes=3)


def test_unknown_field_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"ViTConfig has no field 'embed_dims'.*'embed_dim'"):
        tfimm_lora.create_model("vit_tiny_patch16_224", embed_dims=32)
    with pytest.raises(ValueError, match="Its fields are: name, nb_classes, in_channels"):
        tfimm_lora.create_model("convnext_tiny", lora_rank=3)


@pytest.mark.parametrize(
    ("name", "field", "new"),
    [
        ("vit_tiny_patch16_224", "nb_blocks", "depth"),
        ("vit_tiny_patch16_224", "nb_heads", "num_heads"),
        ("vit_tiny_patch16_224", "interpolate_input", "dynamic_img_size"),
        ("convnext_tiny", "nb_blocks", "depths"),
        ("convnext_tiny", "embed_dim", "dims"),
        ("convnext_tiny", "conv_mlp_block", "conv_mlp"),
        ("convnext_tiny", "init_scale", "ls_init_value"),
    ],
)
def test_tfimms_fields_say_their_new_name(name: str, field: str, new: str):
    with pytest.raises(ValueError, match=f"no field {field!r}. tfimm's {field!r} is {new!r} here"):
        tfimm_lora.create_model(name, **{field: 1})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit_tiny_patch16_224", {"num_heads": 5}, "=192 is not a multiple of num_heads=5"),
        ("vit_tiny_patch16_224", {"global_pool": "sum"}, "'token', 'avg', .*, found 'sum'"),
        ("vit_tiny_patch16_224", {"class_token": False}, "needs class_token=True. Use .*'avg'"),
        ("vit_tiny_patch16_224", {"mlp_layer": "moe"}, "'mlp', 'glu', 'swiglu', found 'moe'"),
        ("vit_tiny_patch16_224", {"block_fn": "Blok"}, "'ParallelThingsBlock', found 'Blok'"),
        ("vit_tiny_patch16_224", {"distilled": True, "reg_tokens": 2}, "and reg_tokens=2"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff", "num_heads": 64}, "halves the heads"),
        (
            "vit_tiny_patch16_224",
            {"block_fn": "ParallelScalingBlock", "mlp_layer": "swiglu"},
            "attention and MLP of its own: leave",
        ),
        (
            "vit_tiny_patch16_224",
            {"block_fn": "ParallelScalingBlock", "scale_mlp_norm": True},
            "has neither scale_attn_norm",
        ),
        ("vit_tiny_patch16_224", {"act_layer": "tanhh"}, "Unknown activation 'tanhh'. Use one of"),
        ("vit_tiny_patch16_224", {"norm_layer": "bn"}, "Unknown norm_layer 'bn'. Use one of"),
        ("vit_tiny_patch16_224", {"input_size": 8}, "smaller than a patch of 16 pixels"),
        ("vit_tiny_patch16_224", {"input_size": (8, 8, 3)}, r"\(height, width\) in pixels, found"),
        ("vit_tiny_patch16_224", {"nb_classes": -1}, "nb_classes has to be 0 or more, found -1"),
        ("vit_tiny_patch16_224", {"in_channels": 0}, "in_channels has to be 1 or more, found 0"),
        ("convnext_tiny", {"depths": (1, 1)}, r"depths=\(1, 1\) and dims=.* differ in length"),
        ("convnext_tiny", {"kernel_sizes": (7, 7)}, "needs one entry per stage"),
        ("convnext_tiny", {"stem_type": "x"}, "Unknown stem_type 'x'. Use one of patch"),
        ("convnext_tiny", {"global_pool": "map"}, "'avgmax' or '', found 'map'"),
        ("convnext_tiny", {"drop_path_rate": 1.5}, r"rate has to be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_values_that_make_no_model_are_refused(name: str, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tfimm_lora.create_model(name, **fields)


def test_lists_in_a_config_are_tuples():
    assert ViTConfig(input_size=[32, 48]) == ViTConfig(input_size=(32, 48))


# --- Outputs and features ---------------------------------------------------------------------


@both
def test_without_classes_the_model_returns_pooled_features(kind: str):
    whole, headless = tiny_model(kind), tiny_model(kind, nb_classes=0, seed=None)
    for path, value in values(whole).items():
        if not path.startswith(whole.cfg.classifier.replace(".", "/") + "/"):
            next(v for v in headless.weights if v.path.split("/", 1)[1] == path).assign(value)
    x = images(whole)
    _, features = whole(x, return_features=True)
    assert headless(x).shape == (3, headless.num_features)
    assert np.array_equal(numpy(headless(x)), numpy(features["features"]))


@both
def test_features_are_those_that_are_named(kind: str):
    model = tiny_model(kind)
    x = images(model)
    logits, features = model(x, return_features=True)
    assert sorted(features) == sorted(model.feature_names)
    assert len(set(model.feature_names)) == len(model.feature_names)
    assert np.array_equal(numpy(logits), numpy(model(x)))
    assert np.array_equal(numpy(features["logits"]), numpy(logits))
    assert features["features"].shape == (3, model.num_features)
    maps, more = model.forward_features(ops.convert_to_tensor(x), return_features=True)
    assert np.array_equal(numpy(maps), numpy(model.forward_features(ops.convert_to_tensor(x))))
    assert set(more) < set(features)
    assert np.array_equal(numpy(model.forward_head(maps)), numpy(logits))
    assert np.array_equal(
        numpy(model.forward_head(maps, pre_logits=True)), numpy(features["features"])
    )


def test_feature_names_and_shapes_of_each_architecture():
    vit = tiny_model("vit")
    assert vit.feature_names == [
        "patch_embedding", "block_0", "block_1", "features_all", "features", "logits",
    ]  # fmt: skip
    assert vit(images(vit), return_features=True)[1]["block_1"].shape == (3, 5, 32)
    convnext = tiny_model("convnext")
    features = convnext(images(convnext), return_features=True)[1]
    assert features["stem"].shape == (3, 8, 8, 8)
    assert features["stage_3/block_0"].shape == (3, 1, 1, 32)
    assert features["conv_features"].shape == (3, 1, 1, 32)


@both
def test_dummy_inputs_fit(kind: str):
    model = tiny_model(kind, in_channels=2)
    assert tuple(model.dummy_inputs.shape) == (1, *model.cfg.input_size, 2)
    assert model(model.dummy_inputs).shape == model.compute_output_shape(model.dummy_inputs.shape)


@both
def test_outputs_do_not_depend_on_the_batch(kind: str):
    model = tiny_model(kind)
    x = images(model, batch=4)
    together = numpy(model(x))
    one_by_one = np.concatenate([numpy(model(x[i : i + 1])) for i in range(4)])
    assert relative_error(one_by_one, together) <= 1e-5


@both
def test_stochastic_parts_act_in_training_only(kind: str):
    model = tiny_model(kind, drop_path_rate=0.5, drop_rate=0.3)
    plain = tiny_model(kind)
    x = images(model)
    assert np.array_equal(numpy(model(x)), numpy(plain(x)))
    first, second = numpy(model(x, training=True)), numpy(model(x, training=True))
    assert not np.array_equal(first, second)


def test_vit_refuses_other_sizes_and_says_what_to_type():
    model = tiny_model("vit")
    with pytest.raises(ValueError, match=r"images of \(16, 16\).*input_size=\(32, 24\), or with "):
        model(np.zeros((1, 32, 24, 3), "float32"))


def test_dynamic_vit_takes_other_sizes():
    fixed, dynamic = tiny_model("vit"), tiny_model("vit", dynamic_img_size=True)
    x = images(fixed)
    assert np.array_equal(numpy(fixed(x)), numpy(dynamic(x)))
    assert dynamic(np.ones((2, 32, 24, 3), "float32")).shape == (2, 10)


def test_convnext_takes_any_size():
    model = tiny_model("convnext")
    assert model(np.ones((2, 64, 96, 3), "float32")).shape == (2, 10)


@pytest.mark.parametrize(
    "fields",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "no_embed_class": True},
        {"init_values": 0.1, "qk_norm": True, "mlp_layer": "glu", "act_layer": "silu"},
        {"pre_norm": True, "final_norm": False, "qkv_bias": False, "norm_layer": "rmsnorm"},
        {"global_pool": "", "reg_tokens": 1, "proj_bias": False},
    ],
)
def test_vit_variants_run_and_survive_saving(fields: dict, tmp_path):
    model = tiny_model("vit", **fields)
    x = images(model)
    outputs = numpy(model(x))
    assert outputs.shape == ((3, 6, 10) if model.cfg.global_pool == "" else (3, 10))
    model.save(tmp_path / "model.keras")
    assert np.array_equal(numpy(keras.saving.load_model(tmp_path / "model.keras")(x)), outputs)


@pytest.mark.parametrize(
    "fields",
    [
        {"conv_mlp": True, "use_grn": True, "ls_init_value": None},
        {"head_norm_first": True, "stem_type": "overlap_act", "norm_layer": "simplenorm"},
        {"head_hidden_size": 12, "stem_type": "overlap_tiered", "kernel_sizes": (3, 5, 7, 7)},
        {"global_pool": ""},
    ],
)
def test_convnext_variants_run_and_survive_saving(fields: dict, tmp_path):
    model = tiny_model("convnext", **fields)
    x = images(model)
    outputs = numpy(model(x))
    assert outputs.shape == ((3, 1, 1, 10) if model.cfg.global_pool == "" else (3, 10))
    model.save(tmp_path / "model.keras")
    assert np.array_equal(numpy(keras.saving.load_model(tmp_path / "model.keras")(x)), outputs)


@both
def test_models_work_inside_functional_models(kind: str):
    model = tiny_model(kind)
    inputs = keras.Input((*model.cfg.input_size, 3))
    whole = keras.Model(inputs, keras.layers.Softmax()(model(inputs)))
    x = images(model)
    assert relative_error(whole.predict(x, verbose=0), ops.softmax(model(x))) <= 1e-5


@both
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_float32_weights(kind: str, policy: str):
    expected = numpy(tiny_model(kind)(images(tiny_model(kind))))
    keras.config.set_dtype_policy(policy)
    model = tiny_model(kind)
    assert {str(w.dtype) for w in model.weights} == {"float32"}
    found = ops.cast(model(images(model)), "float32")
    assert relative_error(found, expected) <= (0.3 if policy == "mixed_bfloat16" else 0.04)
