"""Which class is the LoRA variant of which."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

_lora_class: dict[type, type] = {}
_base_class: dict[type, type] = {}


def register_lora_architecture(
    lora_cls: type | None = None, *, base_cls: type | None = None
) -> Any:
    """Decorator that registers a class as the LoRA variant of an architecture.

    Bare, the base class is the next class with a config in the order of inheritance. With
    ``base_cls=`` it is given, and may be ``lora_cls`` itself, if the class builds regular or LoRA
    layers as its config says.

    Args:
        lora_cls: The LoRA variant; has a ``cfg_class``, whose additional fields start with
            ``lora_``.
        base_cls: The regular class.

    Returns:
        The class.

    Raises:
        ValueError: No base class can be found, or the variant has no ``cfg_class``.

    Example:
        >>> @register_lora_architecture
        ... class LoRAViT(LoRAModel, ViT):
        ...     cfg_class = LoRAViTConfig
    """
    if lora_cls is None:
        decorator: Callable[[type], type] = functools.partial(
            register_lora_architecture, base_cls=base_cls
        )
        return decorator
    if getattr(lora_cls, "cfg_class", None) is None:
        raise ValueError(f"{lora_cls.__name__} needs a cfg_class, the dataclass of its config.")
    if base_cls is None:
        candidates = [c for c in lora_cls.__mro__[1:] if "cfg_class" in vars(c)]
        if not candidates:
            raise ValueError(
                f"{lora_cls.__name__} inherits from no class with a cfg_class. Name the regular "
                "class: @register_lora_architecture(base_cls=...)."
            )
        base_cls = candidates[0]
    known = _lora_class.get(base_cls)
    if known is not None and known is not lora_cls:
        warnings.warn(
            f"{lora_cls.__name__} replaces {known.__name__} as LoRA variant of "
            f"{base_cls.__name__}.",
            stacklevel=2,
        )
    _lora_class[base_cls] = lora_cls
    _base_class[lora_cls] = base_cls
    return lora_cls


def lora_architecture(model_cls: type) -> type:
    """Returns the LoRA variant of a model class.

    Args:
        model_cls: A regular class.

    Raises:
        ValueError: The class has no LoRA variant.

    Example:
        >>> lora_architecture(ConvNeXt).__name__
        'LoRAConvNeXt'
    """
    if model_cls not in _lora_class:
        hint = "Register one with @lora.register_lora_architecture."
        if model_cls in _base_class:
            hint = f"It is the LoRA variant of {_base_class[model_cls].__name__}."
        raise ValueError(f"{model_cls.__name__} has no registered LoRA variant. {hint}")
    return _lora_class[model_cls]


def lora_base_architecture(lora_cls: type) -> type:
    """Returns the regular class of a LoRA variant.

    Args:
        lora_cls: A registered LoRA variant.

    Raises:
        ValueError: The class is no registered LoRA variant.

    Example:
        >>> lora_base_architecture(LoRAConvNeXt).__name__
        'ConvNeXt'
    """
    if lora_cls not in _base_class:
        raise ValueError(f"{lora_cls.__name__} is not registered as LoRA variant of any class.")
    return _base_class[lora_cls]


def lora_config(model_cls: type) -> type:
    """Returns the config class of the LoRA variant of a model class.

    Args:
        model_cls: A regular class.

    Raises:
        ValueError: The class has no LoRA variant.

    Example:
        >>> lora_config(ConvNeXt).__name__
        'LoRAConvNeXtConfig'
    """
    return lora_architecture(model_cls).cfg_class  # type: ignore[attr-defined]
