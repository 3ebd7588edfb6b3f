"""Configuration dataclasses: what a model is built from."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

_Config = TypeVar("_Config")

TIMM_SPELLINGS = {"num_classes": "nb_classes", "in_chans": "in_channels", "img_size": "input_size"}
"""timm's names for fields that carry tfimm's names here."""

# tfimm's names for fields that carry timm's names here, in one config or the other. They are not
# accepted, for some take other values, but errors say what to type.
_TFIMM_SPELLINGS = {
    "nb_blocks": ("depth", "depths"),
    "nb_heads": ("num_heads",),
    "embed_dim": ("dims",),
    "conv_mlp_block": ("conv_mlp",),
    "init_scale": ("ls_init_value",),
    "interpolate_input": ("dynamic_img_size",),
    "lora_train_classifer": ("lora_train_classifier",),
}


@dataclasses.dataclass
class ModelConfig:
    """Base class of all model configurations.

    A configuration lists everything a model's constructor needs. Subclasses add the fields of
    their architecture; every field has a default.

    Attributes:
        name: The model's registered name.
        nb_classes: Number of classes; 0 for no head (the model returns pooled features).
        in_channels: Number of channels of the input images.
        input_size: Height and width of the input images in pixels.
        first_conv: timm path of the layer that reads the image, ``""`` if there is none.
        classifier: timm path of the classification layer, ``""`` if there is none; a tuple of
            paths for a model with several.

    Example:
        >>> cfg = ModelConfig(name="my_model", nb_classes=10)
    """

    name: str = ""
    nb_classes: int = 1000
    in_channels: int = 3
    input_size: tuple[int, int] = (224, 224)
    first_conv: str = ""
    classifier: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        if isinstance(self.input_size, int):
            self.input_size = (self.input_size, self.input_size)
        # JSON and YAML know no tuples; equality of configs must not depend on it.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        if len(self.input_size) != 2 or any(s < 1 for s in self.input_size):
            raise ValueError(
                f"input_size has to be (height, width) in pixels, found {self.input_size}."
            )
        if self.nb_classes < 0:
            raise ValueError(f"nb_classes has to be 0 or more, found {self.nb_classes}.")
        if self.in_channels < 1:
            raise ValueError(f"in_channels has to be 1 or more, found {self.in_channels}.")


def classifier_paths(cfg: Any) -> tuple[str, ...]:
    """Returns the timm paths of a config's classification layers, none for other objects.

    Args:
        cfg: A configuration or facts about a checkpoint.

    Example:
        >>> classifier_paths(tfimm_lora.models.model_config("deit_tiny_distilled_patch16_224"))
        ('head', 'head_dist')
    """
    found = getattr(cfg, "classifier", None) or ()
    found = (found,) if isinstance(found, str) else found
    return tuple(path.replace("/", ".") for path in found)  # tfimm writes head/fc


def nearest_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns a sentence that suggests the known names nearest to a mistyped one, or ``""``."""
    near = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(m) for m in near)}?" if near else ""


def field_names(config_class: type) -> list[str]:
    """Returns the names of all fields of a configuration dataclass."""
    return [f.name for f in dataclasses.fields(config_class)]


def make_config(
    config_class: type[_Config], values: dict[str, Any], overrides: dict[str, Any]
) -> _Config:
    """Builds a configuration from known values and a user's overrides.

    Args:
        config_class: The dataclass.
        values: Field values that are known to be right.
        overrides: Field values that a user typed; timm's spellings are accepted.

    Returns:
        The configuration.

    Raises:
        ValueError: An override is no field of the dataclass; the nearest fields are suggested.

    Example:
        >>> cfg = make_config(ModelConfig, {"name": "m"}, {"num_classes": 10})
    """
    known = field_names(config_class)
    resolved: dict[str, Any] = {}
    for key, value in overrides.items():
        field = key if key in known else TIMM_SPELLINGS.get(key, key)
        if field not in known:
            new = [
                f" tfimm's {key!r} is {f!r} here."
                for f in _TFIMM_SPELLINGS.get(key, ())
                if f in known
            ]
            raise ValueError(
                f"{config_class.__name__} has no field {key!r}."
                f"{''.join(new) or nearest_names(key, [*known, *TIMM_SPELLINGS])} Its fields are: "
                f"{', '.join(known)}."
            )
        if field in resolved:
            raise ValueError(f"{field!r} was given twice, once under timm's spelling.")
        resolved[field] = value
    return config_class(**{**values, **resolved})


def config_to_dict(cfg: Any) -> dict[str, Any]:
    """Returns a configuration as JSON-able dictionary (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return {f.name: plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def base_config_values(cfg: Any, config_class: type) -> dict[str, Any]:
    """Returns those values of ``cfg`` that are fields of ``config_class``."""
    known = set(field_names(config_class))
    return {
        f.name: getattr(cfg, f.name)
        for f in typing.cast(Any, dataclasses.fields(cfg))
        if f.name in known
    }
