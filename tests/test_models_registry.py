"""The registry: listing, looking up and registering models."""

from __future__ import annotations

import dataclasses
import fnmatch

import keras
import pytest
from keras import ops

import tfimm_lora
from tfimm_lora import models
from tfimm_lora.architectures import ConvNeXt, ConvNeXtConfig, PretrainedConfig, ViT, ViTConfig
from tfimm_lora.models import registry

# --- Listing ----------------------------------------------------------------------------------


def test_all_models_are_listed_once_and_sorted_naturally():
    names = tfimm_lora.list_models()
    assert len(names) == len(set(names)) > 100
    assert names.index("vit_base_patch8_224") < names.index("vit_base_patch16_224")
    assert {"convnext_tiny", "vit_tiny_patch16_224", "deit_tiny_patch16_224"} <= set(names)


@pytest.mark.parametrize("wanted", ["convnext_*", "vit_tiny_patch16_2?4", ["vit_tiny*", "deit_*"]])
def test_filters_are_wildcards(wanted):
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found = tfimm_lora.list_models(wanted)
    expected = [
        n for n in tfimm_lora.list_models() if any(fnmatch.fnmatchcase(n, p) for p in patterns)
    ]
    assert found == expected != []


def test_a_filter_without_wildcard_is_a_whole_name():
    assert tfimm_lora.list_models("convnext_tiny") == ["convnext_tiny"]
    assert tfimm_lora.list_models("convnext_tin") == []


def test_excluded_names_are_left_out():
    everything = tfimm_lora.list_models("convnext_*")
    some = tfimm_lora.list_models("convnext_*", exclude_filters=["*_tiny*", "convnext_base"])
    assert set(everything) - set(some) == {
        n for n in everything if "_tiny" in n or n == "convnext_base"
    }


def test_modules_divide_the_models():
    modules = models.list_modules()
    assert {"convnext", "deit", "vision_transformer"} <= set(modules)
    parts = [n for m in modules for n in tfimm_lora.list_models(module=m)]
    assert sorted(parts) == sorted(tfimm_lora.list_models())
    assert all("convnext" in n for n in tfimm_lora.list_models(module="convnext"))


def test_unknown_module_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown module 'convnxt'.*Did you mean 'convnext'"):
        tfimm_lora.list_models(module="convnxt")


def test_tags_are_listed_with_their_architecture():
    tagged = tfimm_lora.list_models("convnext_tiny.*", include_tags=True)
    assert "convnext_tiny.in12k_ft_in1k" in tagged
    assert all(n.startswith("convnext_tiny.") for n in tagged)
    assert {n.partition(".")[0] for n in tfimm_lora.list_models(include_tags=True)} <= set(
        tfimm_lora.list_models()
    )


def test_pretrained_leaves_out_models_without_weights():
    names = tfimm_lora.list_models(pretrained=True)
    assert set(names) < set(tfimm_lora.list_models())
    for name in tfimm_lora.list_models("vit_*", pretrained=True, include_tags=True):
        facts = models.pretrained_config(name)
        assert facts.has_weights, name
        assert facts.hf_hub_id or facts.file, name


def test_every_name_has_a_config_of_its_class():
    for name in tfimm_lora.list_models(include_tags=True):
        cfg, facts = models.model_config(name), models.pretrained_config(name)
        assert type(cfg) is models.model_class(name).cfg_class
        assert f"{cfg.name}.{facts.tag}" == name
        assert cfg.nb_classes == facts.num_classes
        assert tuple(cfg.input_size) == tuple(facts.input_size[1:])


# --- Looking up -------------------------------------------------------------------------------


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown model 'convnext_tinny'.*'convnext_tiny'"):
        tfimm_lora.create_model("convnext_tinny")
    with pytest.raises(ValueError, match=r"list_models\(\) lists all"):
        tfimm_lora.create_model("completely different")
    assert models.is_model("convnext_tiny") and not models.is_model("convnext_tinny")


def test_unknown_tag_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no checkpoint tag 'in1k_fb'.*'fb_in1k'"):
        tfimm_lora.create_model("convnext_tiny.in1k_fb")
    with pytest.raises(ValueError, match=r"no checkpoint tag 'nonsense'.*Its tags"):
        tfimm_lora.create_model("convnext_tiny", pretrained="nonsense")


def test_retired_names_resolve_with_a_warning():
    with pytest.warns(UserWarning, match="called 'convnext_tiny.fb_in22k_ft_in1k' now"):
        facts = models.pretrained_config("convnext_tiny_in22ft1k")
    assert (facts.architecture, facts.tag) == ("convnext_tiny", "fb_in22k_ft_in1k")


def test_a_config_is_fresh_every_time():
    cfg = models.model_config("convnext_tiny")
    cfg.nb_classes = 7
    assert models.model_config("convnext_tiny").nb_classes != 7


# --- Registering ------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations of a test are forgotten after it."""
    monkeypatch.setattr(registry, "_registered", {})


def test_a_registered_variant_is_a_model_like_any_other(own_registry):
    @tfimm_lora.register_model
    def my_little_vit():
        cfg = ViTConfig(
            name="my_little_vit", embed_dim=16, depth=1, num_heads=2, input_size=(16, 16),
            patch_size=8, nb_classes=4,
        )  # fmt: skip
        return ViT, cfg

    assert my_little_vit()[0] is ViT
    assert "my_little_vit" in tfimm_lora.list_models()
    assert tfimm_lora.list_models("my_*", pretrained=True) == []
    model = tfimm_lora.create_model("my_little_vit", nb_classes=5)
    assert model(model.dummy_inputs).shape == (1, 5)
    assert tfimm_lora.create_model("my_little_vit").cfg.nb_classes == 4
    with pytest.raises(ValueError, match="no pretrained weights for 'my_little_vit'"):
        tfimm_lora.create_model("my_little_vit", pretrained=True)


def test_registered_tags_carry_facts(own_registry, tmp_path):
    file = tmp_path / "model.safetensors"
    values = {"depths": (1, 1), "dims": (8, 16), "input_size": (16, 16)}

    @tfimm_lora.register_model
    def my_convnext():
        tags = {
            "small": PretrainedConfig(file=str(file), num_classes=3, input_size=(3, 16, 16)),
            "paper": PretrainedConfig(has_weights=False, mean=(0.5, 0.5, 0.5)),
        }
        return ConvNeXt, ConvNeXtConfig(name="my_convnext", **values), tags

    source = tfimm_lora.create_model("my_convnext.small")
    assert source.cfg.nb_classes == 3
    models.save_safetensors(source, file)
    model = tfimm_lora.create_model("my_convnext", pretrained=True)
    x = ops.ones((1, 16, 16, 3))
    assert ops.all(model(x) == source(x))
    assert tfimm_lora.list_models("my_*", include_tags=True) == [
        "my_convnext.paper",
        "my_convnext.small",
    ]
    assert tfimm_lora.list_models("my_*", pretrained=True, include_tags=True) == [
        "my_convnext.small"
    ]
    assert models.pretrained_config("my_convnext.paper").mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"no pretrained weights for 'my_convnext\.paper'"):
        tfimm_lora.create_model("my_convnext", pretrained="paper")


@dataclasses.dataclass
class PerceptronConfig(models.ModelConfig):
    width: int = 8
    input_size: tuple[int, int] = (4, 4)
    classifier: str = "head"


@models.keras_serializable
class Perceptron(keras.Model):
    """A user's own model, in tfimm's style: no ``build``, but ``dummy_inputs``."""

    cfg_class = PerceptronConfig

    def __init__(self, cfg: PerceptronConfig, **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten(name="flatten")
        self.hidden = keras.layers.Dense(cfg.width, activation="relu", name="hidden")
        self.head = keras.layers.Dense(cfg.nb_classes, name="head")

    @property
    def dummy_inputs(self):
        return ops.zeros((1, *self.cfg.input_size, self.cfg.in_channels))

    def call(self, x, training=None):
        return self.head(self.hidden(self.flatten(x)))


def test_a_users_own_class_can_be_registered(own_registry, tmp_path):
    @tfimm_lora.register_model
    def perceptron():
        return Perceptron, PerceptronConfig(name="perceptron")

    model = tfimm_lora.create_model("perceptron", nb_classes=3, width=5)
    assert isinstance(model, Perceptron) and model.built
    assert model.hidden.kernel.shape == (48, 5)
    x = ops.ones((2, 4, 4, 3))
    model.save(tmp_path / "model.keras")
    loaded = tfimm_lora.create_model(
        "perceptron", model_path=tmp_path / "model.keras", nb_classes=3, width=5
    )
    assert ops.all(loaded(x) == model(x))
    models.save_safetensors(model, tmp_path / "model.safetensors")
    loaded = tfimm_lora.create_model(
        "perceptron", model_path=tmp_path / "model.safetensors", nb_classes=3, width=5
    )
    assert ops.all(loaded(x) == model(x))


def test_registering_nonsense_is_refused(own_registry):
    def other_name():
        return ViT, ViTConfig(name="my_vit")

    def other_class():
        return ViT, ConvNeXtConfig(name="other_class")

    with pytest.raises(ValueError, match="'my_vit' differs from the function's 'other_name'"):
        tfimm_lora.register_model(other_name)
    with pytest.raises(ValueError, match=r"ViT.cfg_class has to be .*\(ConvNeXtConfig\)"):
        tfimm_lora.register_model(other_class)
    assert "my_vit" not in tfimm_lora.list_models()


def test_serialisation_needs_a_config_class():
    with pytest.raises(ValueError, match="Plain needs a class attribute cfg_class"):

        @models.keras_serializable
        class Plain(keras.Model):
            pass

    with pytest.raises(ValueError, match=r"takes a PerceptronConfig \(or a dict.*found ViTConfig"):
        Perceptron(ViTConfig())
