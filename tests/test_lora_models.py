"""LoRA on the zoo's models: what is adapted, what is trained, merging, converting."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import (
    TINY,
    adapted_modules,
    assert_same_bits,
    images,
    numpy,
    randomize,
    relative_error,
    tiny_lora_model,
    tiny_model,
    trained,
    values,
)
from tfimm_lora import lora
from tfimm_lora.weights.names import iterate_layers, named_variables, timm_path

both = pytest.mark.parametrize("kind", ["vit", "convnext"])


def count(weights) -> int:
    return sum(int(np.prod(w.shape)) for w in weights)


class CheapWeights:
    """Makes initialisers write zeros: full-size models for counting only, in a second."""

    def __call__(self, shape, dtype=None, **kwargs):
        return keras.ops.zeros(shape, dtype or "float32")


@pytest.fixture
def cheap_weights(monkeypatch):
    for name in ("TruncatedNormal", "RandomNormal", "VarianceScaling"):
        cls = getattr(keras.initializers, name)
        monkeypatch.setattr(cls, "__call__", CheapWeights.__call__)


# --- Counts of the contract -------------------------------------------------------------------


def test_convnext_tiny_counts(cheap_weights, capsys):
    model = lora.create_model("convnext_tiny", lora_rank=2)
    assert count(model.weights) == model.count_params() == 28_721_608
    assert count(model.trainable_weights) == 132_480
    lora.print_trainable_parameters(model)
    assert capsys.readouterr().out == (
        "trainable params: 132,480 || all params: 28,721,608 || trainable%: 0.4613\n"
    )
    model = lora.create_model("convnext_tiny", lora_rank=2, lora_train_classifier=True)
    assert count(model.weights) == 28_721_608
    assert count(model.trainable_weights) == 901_480


def test_vit_base_counts(cheap_weights):
    model = lora.create_model(
        "vit_base_patch16_224", nb_classes=101, lora_rank=16, lora_targets=["attn.q", "attn.v"]
    )
    assert count(model.trainable_weights) == 667_493 == 589_824 + 77_669
    assert {n for n in trained(model) if n.startswith("head")} == {"head.weight", "head.bias"}


def test_summary_tells_the_same():
    lines: list[str] = []
    model = tiny_lora_model()
    model.summary(print_fn=lambda line, **kwargs: lines.append(line))
    text = "\n".join(lines)
    assert f"Trainable params: {count(model.trainable_weights):,}" in text
    assert f"Non-trainable params: {count(model.non_trainable_weights):,}" in text


# --- Targets ----------------------------------------------------------------------------------


def test_default_targets():
    vit = adapted_modules(tiny_lora_model("vit"))
    assert vit == [
        f"blocks.{i}.{m}" for i in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    convnext = adapted_modules(tiny_lora_model("convnext"))
    assert convnext == [f"stages.{i}.blocks.0.mlp.fc{j}" for i in range(4) for j in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("vit", "attention", {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv",
                              "blocks.1.attn.proj"}),
        ("vit", "mlp", {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}),
        ("vit", "all", {f"blocks.{i}.{m}" for i in (0, 1) for m in
                        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} | {"patch_embed.proj"}),
        ("vit", ["blocks.1.*"], {f"blocks.1.{m}" for m in
                                 ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        ("vit", ["blocks.[01].attn.proj"], {"blocks.0.attn.proj", "blocks.1.attn.proj"}),
        ("vit", [r"blocks\.(0|7)\.mlp\.fc."], {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}),
        ("vit", ["fc1", "head"], {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"}),
        ("vit", "mlp.fc1 attn.proj", {f"blocks.{i}.{m}" for i in (0, 1)
                                      for m in ("mlp.fc1", "attn.proj")}),
        ("convnext", ["conv_dw"], {f"stages.{i}.blocks.0.conv_dw" for i in range(4)}),
        ("convnext", ["stem.0", "downsample.1"], {"stem.0", "stages.1.downsample.1",
                                                  "stages.2.downsample.1",
                                                  "stages.3.downsample.1"}),
        ("convnext", "mlp", {f"stages.{i}.blocks.0.mlp.fc{j}" for i in range(4) for j in (1, 2)}),
    ],
)  # fmt: skip
def test_patterns(kind: str, targets, expected: set[str]):
    model = tiny_lora_model(kind, lora_targets=targets, lora_train_classifier=False)
    assert set(adapted_modules(model)) == expected
    assert trained(model) == {f"{m}.kernel_lora_{x}" for m in expected for x in "ab"}


def test_a_wildcard_for_one_block_takes_no_other():
    model = tiny_lora_model(depth=12, lora_targets=["blocks.1.*"])
    assert {m.split(".")[1] for m in adapted_modules(model)} == {"1"}


def test_all_on_convnext_leaves_only_the_classifier():
    model = tiny_lora_model("convnext", lora_targets="all")
    rest = {timm_path(p) for p, la in iterate_layers(model)
            if isinstance(la, (keras.layers.Dense, keras.layers.Conv2D))
            and not getattr(la, "adapters", None)}  # fmt: skip
    assert rest == {"head.fc"}


@pytest.mark.parametrize("parts", [("q",), ("q", "v"), ("k",), ("q", "k", "v")])
def test_slices_change_their_own_outputs_only(parts: tuple[str, ...]):
    model = tiny_lora_model(depth=1, lora_targets=[f"attn.{p}" for p in parts], lora_rank=2)
    (layer,) = lora.lora_layers(model)
    assert {w.name for w in layer.lora_weights} == {f"kernel_lora_{x}_{p}" for p in parts
                                                   for x in "ab"}  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype("float32")
    outputs = numpy(layer(x)).reshape(2, 5, 3, 32)
    for w in layer.lora_weights:
        w.assign(w * 0)
    base = numpy(layer(x)).reshape(2, 5, 3, 32)
    changed = {name for i, name in enumerate("qkv")
               if not np.array_equal(outputs[:, :, i], base[:, :, i])}  # fmt: skip
    assert changed == set(parts)


def test_slices_with_ranks_and_alphas_of_their_own():
    model = tiny_lora_model(
        depth=1, lora_targets=["attn.q", "attn.v"], lora_rank=4,
        lora_rank_pattern={"attn.v": 2}, lora_alpha_pattern={"attn.q": 8.0},
    )  # fmt: skip
    (layer,) = lora.lora_layers(model)
    found = {u.site.name: (u.site.rank, u.scaling) for u in layer.updates}
    assert found == {"q": (4, 2.0), "v": (2, 1.0)}
    lora.merge_lora_weights(model)


def test_rank_and_alpha_patterns():
    model = tiny_lora_model(
        lora_rank=4, lora_alpha=8, lora_rank_pattern={"blocks.0.*": 2, "attn.*": 3},
        lora_alpha_pattern={"mlp.fc2": 1},
    )  # fmt: skip
    layers = {timm_path(p): la for p, la in iterate_layers(model) if getattr(la, "adapters", None)}
    found = {m: (la.lora_rank, la.scaling) for m, la in layers.items()}
    assert found["blocks.0.attn.qkv"] == (2, 4.0)  # the first pattern that matches
    assert found["blocks.1.attn.qkv"] == (3, pytest.approx(8 / 3))
    assert found["blocks.0.mlp.fc2"] == (2, 0.5)
    assert found["blocks.1.mlp.fc1"] == (4, 2.0)


def test_rslora_scales_with_the_root():
    (layer, *_) = lora.lora_layers(tiny_lora_model(lora_method="rslora", lora_rank=4, lora_alpha=6))
    assert layer.scaling == 3.0
    (layer, *_) = lora.lora_layers(tiny_lora_model(lora_method="rslora", lora_rank=4))
    assert layer.scaling == 2.0


@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform"])
def test_initial_factors(init: str):
    model = tiny_lora_model(seed=None, embed_dim=128, lora_rank=8, lora_init=init)
    for v in named_variables(model):
        if v.leaf == "kernel_lora_b":
            assert not numpy(v.variable).any()
        elif v.leaf == "kernel_lora_a":
            a = numpy(v.variable)
            expected = 1 / 8 if init == "gaussian" else 1 / np.sqrt(3 * a.shape[0])
            assert np.std(a) == pytest.approx(expected, rel=0.15)


# --- What is trained --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mode", ["none", "lora_only", "all"])
def test_bias_modes(kind: str, mode: str):
    model = tiny_lora_model(kind, lora_train_bias=mode, lora_train_classifier=False)
    adapted = set(adapted_modules(model))
    for v in named_variables(model):
        wanted = "_lora_" in v.leaf or (
            v.leaf in ("bias", "beta")
            and (mode == "all" or (mode == "lora_only" and v.module in adapted))
        )
        assert v.variable.trainable == wanted, v.name


@both
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("forced", [None, True, False])
def test_the_classifier_is_trained_when_fresh_or_forced(kind: str, fresh: bool, forced):
    model = tiny_lora_model(kind, nb_classes=7 if fresh else 1000, lora_train_classifier=forced)
    head = {f"{model.cfg.classifier}.{leaf}" for leaf in ("weight", "bias")}
    assert (head <= trained(model)) == (fresh if forced is None else forced)
    assert head <= trained(model) or not head & trained(model)


@both
def test_further_layers_can_be_trained_in_full(kind: str):
    extra = "blocks.1.norm2" if kind == "vit" else "stages.3.blocks.0.norm"
    model = tiny_lora_model(kind, lora_modules_to_save=(extra,), lora_train_classifier=False)
    assert {n for n in trained(model) if "_lora_" not in n} == {f"{extra}.weight", f"{extra}.bias"}


@both
def test_without_classifier_nothing_else_is_trained(kind: str):
    model = tiny_lora_model(kind, nb_classes=0, lora_train_classifier=True)
    assert all("_lora_" in name for name in trained(model))


@both
def test_lists_of_trainable_weights(kind: str):
    model = tiny_lora_model(kind, lora_train_classifier=False)
    factors = lora.lora_trainable_weights(model)
    assert [id(w) for w in factors] == [id(w) for w in model.trainable_weights]
    head = model.cfg.classifier
    for mode in ("none", "lora_only", "all"):
        for layers in (None, [head]):
            yes = lora.lora_trainable_weights(model, train_bias=mode, trainable_layers=layers)
            no = lora.lora_non_trainable_weights(model, train_bias=mode, trainable_layers=layers)
            assert {id(w) for w in yes} | {id(w) for w in no} == {id(w) for w in model.weights}
            assert len(yes) + len(no) == len(model.weights)
    assert len(lora.lora_trainable_weights(model, trainable_layers=[head])) == len(factors) + 2
    # Asking does not change anything.
    assert [id(w) for w in model.trainable_weights] == [id(w) for w in factors]


def test_flags_can_be_set_again():
    model = tiny_lora_model()
    before = trained(model)
    model.trainable = False
    model.trainable = True
    assert trained(model) != before
    lora.set_trainable(model, trainable_layers=["head"])
    assert trained(model) == before
    model.trainable = False
    assert not model.trainable_weights
    lora.set_trainable(model, train_bias="all")
    assert len(model.trainable_weights) > len(before) - 2


# --- Training ---------------------------------------------------------------------------------


@both
def test_fit_changes_trained_weights_and_nothing_else(kind: str):
    model = tiny_lora_model(kind, lora_train_bias="lora_only", drop_path_rate=0.1, seed=0)
    before, wanted = values(model), {v.path for v in named_variables(model) if v.variable.trainable}
    x, y = images(model, 8), np.arange(8) % 10
    model.compile(
        keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(x, y, epochs=6, batch_size=4, verbose=0).history["loss"]
    assert history[-1] < history[0]
    after = values(model)
    changed = {p for p in after if after[p].tobytes() != before[p].tobytes()}
    assert changed == wanted
    # Slots of the optimizer: two for every trained weight, beside iterations and learning rate.
    assert len(model.optimizer.variables) == 2 + 2 * len(wanted)


# --- Merging and converting -------------------------------------------------------------------


@both
def test_merging_after_a_compiled_predict(kind: str):
    model = tiny_lora_model(kind)
    x = images(model)
    model.compile(jit_compile=False)
    expected = model.predict(x, verbose=0)
    for _ in range(2):
        lora.merge_lora_weights(model)
        assert relative_error(model.predict(x, verbose=0), expected) <= 1e-5
        lora.unmerge_lora_weights(model)
        assert np.array_equal(model.predict(x, verbose=0), expected)


@both
def test_a_function_traced_before_merging_stays_right(kind: str):
    model = tiny_lora_model(kind)
    x = keras.ops.convert_to_tensor(images(model))
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.function is TensorFlow's")
    import tensorflow as tf

    traced = tf.function(model)
    expected = numpy(traced(x))
    lora.merge_lora_weights(model)
    assert relative_error(traced(x), expected) <= 1e-5
    lora.unmerge_lora_weights(model)
    assert np.array_equal(numpy(traced(x)), expected)


@both
def test_conversion_to_and_fro(kind: str):
    model = tiny_model(kind, drop_path_rate=0.1)
    x = images(model)
    before = values(model)
    low = lora.convert_to_lora_model(model, lora_rank=2, lora_alpha=4)
    assert type(low) is lora.lora_architecture(type(model))
    assert np.array_equal(numpy(low(x)), numpy(model(x)))
    assert_same_bits(values(model), before)
    assert low.pretrained_cfg == model.pretrained_cfg
    randomize(low, 3, only="_lora_")
    regular = lora.convert_to_regular_model(low)
    assert type(regular) is type(model) and regular.cfg == model.cfg
    assert regular.pretrained_cfg == model.pretrained_cfg
    assert relative_error(regular(x), low(x)) <= 1e-5
    assert relative_error(regular(x), model(x)) > 1e-2
    assert_same_bits(values(model), before)
    # What LoRA adds to the config starts with lora_, and nothing else does.
    extra = set(vars(low.cfg)) - set(vars(model.cfg))
    assert extra and all(name.startswith("lora_") for name in extra)


@both
def test_create_model_equals_converting(kind: str, tmp_path):
    model = tiny_model(kind)
    path = tfimm_lora.models.save_safetensors(model, tmp_path / "model.safetensors")
    name, fields = TINY[kind]
    created = lora.create_model(name, model_path=path, lora_rank=3, **fields)
    converted = lora.convert_to_lora_model(model, lora_rank=3)
    assert created.cfg == converted.cfg
    assert values(created).keys() == values(converted).keys()
    x = images(model)
    assert np.array_equal(numpy(created(x)), numpy(converted(x)))
    # The file's head has ten classes and so has the model: it is not fresh.
    assert all("_lora_" in n for n in trained(created))


@both
def test_merged_layers_cost_no_more(kind: str):
    """A merged layer applies its kernel alone: outputs are those of the regular model's bits."""
    model = tiny_lora_model(kind)
    x = images(model)
    regular = lora.convert_to_regular_model(model)
    lora.merge_lora_weights(model)
    assert np.array_equal(numpy(model(x)), numpy(regular(x)))


def test_part_of_a_model_can_be_merged():
    model = tiny_lora_model()
    x = images(model)
    expected = numpy(model(x))
    model.blocks[0].mlp.fc1.merge_weights()
    assert relative_error(model(x), expected) <= 1e-5
    lora.merge_lora_weights(model)
    lora.unmerge_lora_weights(model)
    assert np.array_equal(numpy(model(x)), expected)


def test_lora_weight_names_find_all_factors():
    import re

    for targets in (None, ["attn.q"]):
        model = tiny_lora_model(lora_targets=targets)
        for v in named_variables(model):
            assert any(re.search(p, v.path) for p in lora.LORA_WEIGHT_NAMES) == ("_lora_" in v.path)


def test_adapter_of_slices_with_a_bias_travels(tmp_path):
    model = tiny_lora_model(
        lora_targets=["attn.q", "attn.v"], lora_rank=2, lora_options={"bias": True},
        lora_alpha_pattern={"attn.v": 5.0},
    )  # fmt: skip
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(tiny_model(), tmp_path, check_base=False)
    found = values(again)
    for path, value in values(model).items():
        if "_lora_" in path or "lora_bias" in path:
            np.testing.assert_allclose(found[path], value, rtol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="An adapter's name is made of letters, digits"):
        lora.save_adapter(model, tmp_path, name="a/../b")
