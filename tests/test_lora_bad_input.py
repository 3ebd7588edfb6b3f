"""Bad input to LoRA: what was found, what was expected, what to type instead."""

from __future__ import annotations

import json
import re

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tfimm_lora
from tests.helpers import (
    TINY,
    assert_same_bits,
    images,
    sequential,
    tiny_lora_model,
    tiny_model,
    values,
)
from tfimm_lora import lora

L = keras.layers

# --- Fields -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4", None])
def test_a_rank_is_a_positive_integer(rank):
    message = re.escape(f"lora_rank has to be an integer of at least 1, found {rank!r}")
    with pytest.raises(ValueError, match=message):
        lora.create_model("vit_tiny_patch16_224", lora_rank=rank)
    with pytest.raises(ValueError, match=message):
        lora.LoRADense(3, lora_rank=rank)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank_pattern": {"mlp.fc1": 0}}, r"lora_rank_pattern\['mlp.fc1'\] .* found 0"),
        ({"lora_rank_pattern": {"mlp.fc9": 2}}, r"lora_rank_pattern: 'mlp.fc9' matches none of"),
        ({"lora_alpha_pattern": {"patch_embed": 2.0}}, r"lora_alpha_pattern: 'patch_embed' matc"),
        ({"lora_alpha": 0}, "lora_alpha has to be positive, found 0"),
        ({"lora_alpha": -2.0}, "lora_alpha has to be positive, found -2.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout has to be in \[0, 1\), found 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout has to be in \[0, 1\), found -0.1"),
        ({"lora_method": "rs_lora"}, r"Unknown lora_method 'rs_lora'.*'rslora'.* Use one of lora"),
        ({"lora_init": "gausian"}, r"Unknown lora_init 'gausian'.*'gaussian'"),
        ({"lora_train_bias": "some"}, r"Unknown lora_train_bias 'some'.*none, lora_only, all"),
        ({"lora_train_classifier": "yes"}, "has to be None, True or False, found 'yes'"),
        ({"lora_rnk": 2}, r"LoRAViTConfig has no field 'lora_rnk'.*'lora_rank'"),
        ({"lora_modules_to_save": ("nothing",)}, "the model has no weights below 'nothing'"),
    ],
)
def test_values_that_make_no_sense(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        lora.create_model("vit_tiny_patch16_224", **{**TINY["vit"][1], **fields})
    if "lora_rnk" not in fields:
        with pytest.raises(ValueError, match=message):
            lora.convert_to_lora_model(tiny_model(), **fields)


def test_convert_takes_lora_fields_only():
    with pytest.raises(
        ValueError, match=r"start with 'lora_', found 'rank', 'depth'. Pass these to"
    ):
        lora.convert_to_lora_model(tiny_model(), rank=2, depth=3)


# --- Targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mlp.fc3"], r"'mlp.fc3' matches no layer. Did you mean .*'mlp.fc.'.*that can be adapted "
                      r"end in: .*attn.q"),
        (["blocks.7.*"], "'blocks.7.\\*' matches no layer"),
        (["mlp.fc1", "attn.query"], "'attn.query' matches no layer"),
        (["norm1"], "'norm1' matches 'blocks.0.norm1', a LayerNormalization, which cannot be ada"),
        (["blocks.0"], r"a ViTBlock, which cannot be adapted. Use 'blocks.0.\*' for what is in"),
        ([], "lora_targets is empty"),
        ("", "lora_targets is empty"),
        (["attn.qkv", "attn.q"], "'blocks.0.attn.qkv' is targeted as a whole and in slices .q."),
        (["((("], r"'\(\(\(' matches no layer"),
    ],
)  # fmt: skip
def test_targets_have_to_match_something(targets, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_lora_model(lora_targets=targets)


def test_the_classifier_cannot_be_adapted_and_trained():
    with pytest.raises(ValueError, match="'head' is targeted by lora_targets and trained in full"):
        tiny_lora_model(lora_targets=["head"], lora_train_classifier=True)


def test_trainable_layers_have_to_exist():
    model = tiny_lora_model()
    with pytest.raises(ValueError, match="trainable_layers: the model has no weights below 'haed'"):
        lora.lora_trainable_weights(model, trainable_layers=["haed"])
    with pytest.raises(ValueError, match=r"Unknown train_bias 'every'. Use one of none, lora_only"):
        lora.lora_trainable_weights(model, train_bias="every")


# --- Ranks that do not fit --------------------------------------------------------------------


def test_an_adapter_larger_than_its_kernel_warns_with_both_numbers():
    message = r"fc: the adapter has 100 weights where the kernel \(12 x 8\) has 96. Use a lower "
    with pytest.warns(UserWarning, match=message):
        sequential(lora.LoRADense(8, lora_rank=5, name="fc"), shape=(12,))
    with pytest.warns(UserWarning, match=r"124 weights where the kernel \(27 x 4\) has 108"):
        sequential(lora.LoRAConv2D(4, 3, lora_rank=4, name="conv"), shape=(5, 5, 3))
    with pytest.warns(UserWarning, match=r"126 weights where the kernel \(9 x 12\) has 108"):
        sequential(lora.LoRADepthwiseConv2D(3, lora_rank=6, name="dw"), shape=(5, 5, 12))


@pytest.mark.filterwarnings("error")
def test_an_adapter_smaller_than_its_kernel_does_not_warn():
    sequential(lora.LoRADense(8, lora_rank=4, name="fc"), shape=(12,))


def test_a_rank_has_to_be_a_multiple_of_the_groups():
    base = sequential(L.Conv2D(9, 3, groups=3, name="conv"), shape=(5, 5, 6))
    message = "'conv': rank 4 is not a multiple of its 3 groups. Use rank 3, for this layer alone"
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(base, lora_rank=4)
    assert lora.convert_to_lora_model(base, lora_rank=4, lora_rank_pattern={"conv": 3})


def test_an_einsum_that_is_no_matrix_product():
    layer = L.EinsumDense("abc,bcd->abd", output_shape=(4, 3), name="odd")
    base = sequential(layer, shape=(4, 5))
    with pytest.raises(
        ValueError, match="'odd' has the equation 'abc,bcd->abd', whose kernel is no"
    ):
        lora.convert_to_lora_model(base)


# --- The wrong model --------------------------------------------------------------------------


def test_converting_twice():
    message = r"has LoRA layers already. Use lora.convert_to_regular_model\(model\) first"
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(tiny_lora_model())
    base = sequential(L.Dense(3, name="top"), shape=(4,))
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(lora.convert_to_lora_model(base, lora_rank=2))
    inputs = keras.Input((16, 16, 3))
    nested = keras.Model(inputs, tiny_lora_model()(inputs))
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_model(nested)


class Plain(keras.Model):
    """A subclassed model that nobody registered."""

    def __init__(self):
        super().__init__()
        self.top = L.Dense(3)

    def call(self, x):
        return self.top(x)


def test_a_class_without_lora_variant():
    model = Plain()
    model(np.ones((1, 4), "float32"))
    with pytest.raises(
        ValueError, match=r"Plain has no registered LoRA variant. Register one with @"
    ):
        lora.convert_to_lora_model(model)
    with pytest.raises(ValueError, match="It is the LoRA variant of ViT"):
        lora.lora_architecture(lora.LoRAViT)
    with pytest.raises(ValueError, match="ViT is not registered as LoRA variant of any class"):
        lora.lora_base_architecture(type(tiny_model()))


def test_regular_models_have_nothing_to_merge():
    model = tiny_model()
    for function in (lora.merge_lora_weights, lora.unmerge_lora_weights):
        with pytest.raises(ValueError, match=r"has no LoRA layers. Use lora.convert_to_lora_model"):
            function(model)
    with pytest.raises(ValueError, match="it is a regular model already"):
        lora.convert_to_regular_model(model)
    with pytest.raises(ValueError, match=r"is no LoRA model. Use lora.convert_to_lora_model"):
        lora.save_adapter(model, "nowhere")


def test_merging_twice_and_unmerging_unmerged():
    model = tiny_lora_model()
    with pytest.raises(ValueError, match="LoRA weights of this model are not merged"):
        lora.unmerge_lora_weights(model)
    lora.merge_lora_weights(model)
    before = values(model)
    with pytest.raises(ValueError, match="have already been merged"):
        lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="fc1 have already been merged"):
        model.blocks[0].mlp.fc1.merge_weights()
    assert_same_bits(values(model), before)
    model.blocks[0].mlp.fc1.unmerge_weights()
    with pytest.raises(ValueError, match="fc1 are not merged"):
        model.blocks[0].mlp.fc1.unmerge_weights()


def test_training_while_merged():
    model = tiny_lora_model()
    x, y = images(model), np.arange(3)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, verbose=0)
    lora.merge_lora_weights(model)
    before = values(model)
    message = r"are merged, so training would not reach them. Call lora.unmerge_lora_weights\(model"
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=message):
        model(x, training=True)
    assert_same_bits(values(model), before)
    model.evaluate(x, y, verbose=0)
    lora.unmerge_lora_weights(model)
    model.fit(x, y, verbose=0)


def test_layers_without_lora_version():
    message = r"'norm' of type LayerNormalization has no LoRA version. Supported: Conv2D, Dense, De"
    with pytest.raises(ValueError, match=message):
        lora.convert_to_lora_layer(L.LayerNormalization(name="norm"))
    with pytest.raises(ValueError, match=r"of type LoRADense .* It is one already"):
        lora.convert_to_lora_layer(lora.LoRADense(3))
    with pytest.raises(ValueError, match=r"Unknown arguments \['lora_rnk'\]. Known: lora_rank"):
        lora.convert_to_lora_layer(L.Dense(3), lora_rnk=2)
    layer = L.Dense(3, name="own")
    layer.build((None, 4))
    layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"'own' has Keras' own LoRA weights \(enable_lora\)"):
        lora.convert_to_lora_layer(layer)


def test_weights_of_a_regular_model_into_a_lora_model(tmp_path):
    tiny_model().save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="saved from a regular model or with another LoRA config"):
        tiny_lora_model().load_weights(tmp_path / "m.weights.h5")
    tiny_lora_model(lora_rank=2).save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(
        ValueError, match=r"'kernel_lora_a' has shape \(\d+, 2\) in the file and .*3"
    ):
        tiny_lora_model(lora_rank=3).load_weights(tmp_path / "m.weights.h5")


# --- Adapters ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """The base model, its LoRA version and the folder of its adapter."""
    base = tiny_model(seed=1)
    model = lora.convert_to_lora_model(base, lora_rank=2, lora_targets=["attn.q", "mlp.fc1"])
    return base, model, lora.save_adapter(model, tmp_path / "adapter")


def edit(folder, change, metadata=None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        kept = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=kept)


def test_adapter_of_another_base(adapter):
    _, _, folder = adapter
    other = tiny_model(seed=2)
    with pytest.raises(
        ValueError, match=r"trained on other weights of 'vit_tiny.*check_base=False"
    ):
        lora.load_adapter(other, folder)
    assert lora.lora_layers(lora.load_adapter(other, folder, check_base=False))
    with pytest.raises(ValueError, match=r"matches no layer|matches none|does not fit"):
        lora.load_adapter(tiny_model("convnext"), folder)
    with pytest.raises(ValueError, match=r"matches no layer|does not fit|other weights"):
        lora.load_adapter(tiny_model(depth=1), folder)


def test_adapter_with_missing_and_surplus_tensors(adapter):
    base, model, folder = adapter
    name = "base_model.model.blocks.1.mlp.fc1.lora_B.weight"
    edit(folder, lambda t: t.update(extra=t.pop(name)))
    with pytest.raises(ValueError, match=r"'extra' does not start with 'base_model.model.'"):
        lora.load_adapter(base, folder)
    edit(folder, lambda t: t.update({"base_model.model.extra.weight": t.pop("extra")}))
    before = values(model)
    with pytest.raises(
        ValueError,
        match=r"Missing in the adapter: blocks.1.mlp.fc1.lora_B.weight.*Not in the model: extra.w",
    ):
        lora.load_adapter(model, folder)
    assert_same_bits(values(model), before)


def test_adapter_with_wrong_shapes(adapter):
    _, model, folder = adapter
    name = "base_model.model.blocks.1.mlp.fc1.lora_B.weight"
    edit(folder, lambda t: t.update({name: np.ones((7, 2), "float32")}))
    before = values(model)
    with pytest.raises(ValueError, match=r"fc1.*shape \(7, 2\) in the adapter and \(128, 2\) in"):
        lora.load_adapter(model, folder)
    assert_same_bits(values(model), before)


def test_adapter_that_is_a_pickle(adapter):
    base, _, folder = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_model.safetensors. adapter_model.bin is a pickle"
    ):
        lora.load_adapter(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(ValueError, match="can run code when it is opened"):
        lora.load_adapter(base, folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_adapter(adapter, keep):
    base, _, folder = adapter
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is no complete safetensors"):
        lora.load_adapter(base, folder)


def test_adapter_without_config(adapter):
    base, _, folder = adapter
    config = folder / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no JSON object"):
        lora.load_adapter(base, folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        lora.load_adapter(base, folder)
    with pytest.raises(FileNotFoundError, match="There is no adapter folder"):
        lora.load_adapter(base, str(folder / "nothing"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "POLY"}, "peft_type is 'POLY'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4', which changed the base model's weights",
        ),
    ],
)
def test_adapters_that_are_no_plain_lora(adapter, change: dict, message: str):
    base, _, folder = adapter
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})  # as PEFT writes it
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(base, folder)


def test_adapter_with_another_class_count(tmp_path):
    source = tiny_lora_model(nb_classes=4)
    lora.save_adapter(source, tmp_path)
    with pytest.raises(
        ValueError, match=r"classifier has 4 classes and the model 10. Create .* nb_classes=4"
    ):
        lora.load_adapter(tiny_model(), tmp_path)


def test_adapter_with_another_rank_or_method(adapter):
    base, _, folder = adapter
    fields = {"lora_targets": ["attn.q", "mlp.fc1"]}
    other = lora.convert_to_lora_model(base, lora_rank=3, **fields)
    with pytest.raises(ValueError, match=r"rank 2 .* in the adapter, rank 3 .* in the model"):
        lora.load_adapter(other, folder)
    other = lora.convert_to_lora_model(base, lora_rank=2, lora_method="rslora", **fields)
    with pytest.raises(ValueError, match=r"lora_method='lora' and the model 'rslora'"):
        lora.load_adapter(other, folder)
    other = lora.convert_to_lora_model(base, lora_rank=2, **fields)
    lora.merge_lora_weights(other)
    with pytest.raises(ValueError, match=r"are merged. Call (lora.)?unmerge_lora_weights"):
        lora.load_adapter(other, folder)


def test_an_edited_config_is_noticed(adapter):
    base, model, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.warns(UserWarning, match="not the config that was saved with the weights"):
        loaded = lora.load_adapter(base, folder)
    assert_same_bits(values(loaded), values(model))


def test_unknown_names_of_the_zoo():
    with pytest.raises(ValueError, match=r"Unknown model 'vit_tny_patch16_224'.*'vit_tiny_patch16"):
        lora.create_model("vit_tny_patch16_224", lora_rank=2)
    assert "vit_tny_patch16_224" not in tfimm_lora.list_models()
