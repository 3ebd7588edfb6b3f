"""The LoRA registry: bare decorator, base_cls=, a class that is its own variant."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import tfimm_lora
from tests.helpers import assert_same_bits, numpy, randomize, relative_error, values
from tfimm_lora import lora, models
from tfimm_lora.architectures import ConvNeXt, ViT
from tfimm_lora.lora import registry as lora_registry
from tfimm_lora.models import registry


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """Registrations of a test are forgotten after it."""
    lora.lora_architecture(ViT)
    monkeypatch.setattr(registry, "_registered", {})
    for name in ("_lora_class", "_base_class"):
        monkeypatch.setattr(lora_registry, name, dict(getattr(lora_registry, name)))


@dataclasses.dataclass
class NetConfig(models.ModelConfig):
    width: int = 12
    input_size: tuple[int, int] = (4, 4)
    nb_classes: int = 3
    classifier: str = "head"


@models.keras_serializable
class Net(keras.Model):
    """A user's architecture, without any base class of this package."""

    cfg_class: Any = NetConfig

    def __init__(self, cfg: NetConfig, **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten(name="flatten")
        self.hidden = keras.layers.Dense(cfg.width, activation="gelu", name="hidden")
        self.head = keras.layers.Dense(cfg.nb_classes, name="head")

    @property
    def dummy_inputs(self):
        return ops.zeros((1, *self.cfg.input_size, self.cfg.in_channels))

    def build(self, input_shape):
        pixels = self.cfg.input_size[0] * self.cfg.input_size[1] * self.cfg.in_channels
        self.hidden.build((None, pixels))
        self.head.build((None, self.cfg.width))

    def call(self, x, training=None):
        return self.head(self.hidden(self.flatten(x)))


@dataclasses.dataclass
class LoRANetConfig(lora.LoRAConfig, NetConfig):
    pass


@models.keras_serializable
class LoRANet(lora.LoRAModel, Net):
    cfg_class: Any = LoRANetConfig


@dataclasses.dataclass
class SelfConfig(NetConfig):
    lora_rank: int = 0
    lora_train_bias: str = "none"


@models.keras_serializable
class SelfNet(keras.Model):
    """Builds regular or LoRA layers as its config says: its own variant."""

    cfg_class: Any = SelfConfig

    def __init__(self, cfg: SelfConfig, **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten(name="flatten")
        if cfg.lora_rank:
            self.hidden = lora.LoRADense(cfg.width, lora_rank=cfg.lora_rank, name="hidden")
        else:
            self.hidden = keras.layers.Dense(cfg.width, name="hidden")
        self.head = keras.layers.Dense(cfg.nb_classes, name="head")

    dummy_inputs = Net.dummy_inputs
    build = Net.build
    call = Net.call


def check(base: keras.Model, lora_cls: type, tmp_path) -> None:
    """Conversion, merging, saving and adapters of a registered architecture."""
    x = np.random.default_rng(0).standard_normal((5, 4, 4, 3)).astype("float32")
    model = lora.convert_to_lora_model(base, lora_rank=2)
    assert type(model) is lora_cls
    assert np.array_equal(numpy(model(x)), numpy(base(x)))
    assert {w.name for w in model.trainable_weights} == {"kernel_lora_a", "kernel_lora_b"}
    randomize(model, 3, only="_lora_")
    regular = lora.convert_to_regular_model(model)
    assert not lora.lora_layers(regular)
    assert relative_error(regular(x), model(x)) <= 1e-5
    assert relative_error(regular(x), base(x)) > 1e-2
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert_same_bits(values(loaded), values(model))
    lora.save_adapter(model, tmp_path / "adapter")
    assert_same_bits(values(lora.load_adapter(base, tmp_path / "adapter")), values(model))
    lora.merge_lora_weights(model)
    assert relative_error(model(x), regular(x)) <= 1e-6


def _register_net() -> keras.Model:
    @tfimm_lora.register_model
    def net():
        return Net, NetConfig(name="net")

    return randomize(tfimm_lora.create_model("net"))


def test_the_packages_own():
    assert lora.lora_architecture(ConvNeXt) is lora.LoRAConvNeXt
    assert lora.lora_base_architecture(lora.LoRAConvNeXt) is ConvNeXt
    assert lora.lora_config(ViT) is lora.LoRAViTConfig


def test_bare_decorator(tmp_path):
    assert lora.register_lora_architecture(LoRANet) is LoRANet
    assert lora.lora_architecture(Net) is LoRANet
    base = _register_net()
    check(base, LoRANet, tmp_path)
    created = lora.create_model("net", lora_rank=3, lora_targets=["hidden"], nb_classes=4)
    assert [la.name for la in lora.lora_layers(created)] == ["hidden"]
    assert {v.path.split("/")[-2] for v in created.trainable_weights} == {"hidden", "head"}


def test_base_class_given(tmp_path):
    @lora.register_lora_architecture(base_cls=Net)
    @models.keras_serializable
    class Elsewhere(LoRANet):
        pass

    assert lora.lora_architecture(Net) is Elsewhere
    check(_register_net(), Elsewhere, tmp_path)


def test_a_class_that_is_its_own_variant(tmp_path):
    lora.register_lora_architecture(SelfNet, base_cls=SelfNet)
    assert lora.lora_architecture(SelfNet) is lora.lora_base_architecture(SelfNet) is SelfNet

    @tfimm_lora.register_model
    def self_net():
        return SelfNet, SelfConfig(name="self_net")

    base = randomize(tfimm_lora.create_model("self_net"))
    assert not lora.lora_layers(base)
    # Its config lacks most of what a PEFT file records, such as alpha.
    check(base, SelfNet, tmp_path)


def test_a_second_variant_replaces_the_first_with_a_warning():
    with pytest.warns(UserWarning, match="Other replaces LoRAConvNeXt as LoRA variant of ConvNeXt"):

        @lora.register_lora_architecture(base_cls=ConvNeXt)
        class Other(lora.LoRAConvNeXt):
            pass


def test_classes_that_cannot_be_registered():
    class WithoutConfig:
        pass

    class WithoutBase:
        cfg_class = LoRANetConfig

    with pytest.raises(ValueError, match="WithoutConfig needs a cfg_class"):
        lora.register_lora_architecture(WithoutConfig)
    with pytest.raises(
        ValueError, match=r"inherits from no class with a cfg_class. Name the regular"
    ):
        lora.register_lora_architecture(WithoutBase)
