"""The transform that a model's images need, from the facts about its checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.architectures.pretrained import PretrainedConfig
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.evaluation_transform import EvaluationTransform
from tfimm_lora.data.registry import suggest
from tfimm_lora.data.training_transform import TrainingTransform
from tfimm_lora.models.registry import pretrained_config

_SETTINGS = {field.name for field in dataclasses.fields(EvaluationTransform)}
_AUGMENTATION = tuple(
    field.name for field in dataclasses.fields(TrainingTransform) if field.name not in _SETTINGS
)


def create_transform(
    model_or_name: Any,
    is_training: bool = False,
    *,
    input_size: int | tuple[int, ...] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    mean: float | tuple[float, ...] | None = None,
    std: float | tuple[float, ...] | None = None,
    use_test_size: bool = False,
    normalize: bool = True,
    **augmentation: Any,
) -> EvaluationTransform | TrainingTransform:
    """Creates the transform that makes a model's input from one image of any size.

    For evaluation it is timm's: the resized size, the crop and the filter are those of timm's
    ``create_transform``, and the pixels too. For training it cuts out a random part, flips, and
    augments as asked.

    Args:
        model_or_name: A model of the zoo, or a registered name with or without tag. A model's own
            image size and channels are used.
        is_training: Whether images change at random. Defaults to False.
        input_size: Height and width of the result: one number, (height, width), or timm's
            (channels, height, width).
        interpolation: ``bicubic``, ``bilinear``, ``lanczos``, ``hamming``, ``box`` or ``nearest``;
            for training also ``random``.
        crop_pct: Side of the crop over the side of the resized image; evaluation only.
        crop_mode: ``center``, ``squash`` or ``border``; evaluation only.
        mean: Mean per channel, for values in [0, 1]; one number is for all channels.
        std: Standard deviation per channel, likewise.
        use_test_size: Use the size and crop with which timm says the checkpoint does best, rather
            than those it was trained with. Defaults to False.
        normalize: Whether to normalise; without it the result is uint8. Defaults to True.
        augmentation: For training, the other arguments of :class:`TrainingTransform`: ``scale``,
            ``ratio``, ``hflip``, ``vflip``, ``color_jitter``, ``auto_augment``, ``re_prob``,
            ``re_mode``, ``seed``.

    Returns:
        A function from an image (PIL, NumPy or, in ``dataset.map``, a tensor; (h, w, channels),
        uint8) to an array or tensor of shape (height, width, channels), float32. What it was
        resolved to can be read from its attributes.

    Raises:
        ValueError: The name is unknown.
        DataError: An argument is unknown or out of range.

    Example:
        >>> create_transform("convnext_tiny")(Image.open("rose.jpg")).shape
        (224, 224, 3)
    """
    for name in augmentation:
        if name not in _AUGMENTATION:
            known = (*_AUGMENTATION, *sorted(_SETTINGS), "use_test_size")
            raise DataError(
                f"create_transform has no argument {name!r}.{suggest(name, known)} For training: "
                f"{', '.join(_AUGMENTATION)}."
            )
    if augmentation and not is_training:
        raise DataError(
            f"{', '.join(augmentation)} change images at random: give is_training=True as well."
        )
    if is_training and (crop_pct is not None or crop_mode is not None):
        raise DataError(
            "crop_pct and crop_mode are for evaluation; what is cut out in training is said by "
            "scale and ratio."
        )
    facts, size = _facts(model_or_name, use_test_size)
    size = size if input_size is None else _image_size(input_size, size[0])
    settings: dict[str, Any] = {
        "input_size": size,
        "interpolation": interpolation or facts.interpolation,
        "mean": facts.mean if mean is None else _values("mean", mean, size[0]),
        "std": facts.std if std is None else _values("std", std, size[0]),
        "normalize": normalize,
    }
    if is_training:
        return TrainingTransform(**settings, **augmentation)
    if crop_pct is None:
        crop_pct = (facts.test_crop_pct if use_test_size else None) or facts.crop_pct
    return EvaluationTransform(
        **settings, crop_pct=crop_pct, crop_mode=crop_mode or facts.crop_mode
    )


def _facts(
    model_or_name: Any, use_test_size: bool
) -> tuple[PretrainedConfig, tuple[int, int, int]]:
    """The facts about a checkpoint, and channels, height and width of its images."""
    if isinstance(model_or_name, str):
        facts = pretrained_config(model_or_name)
        channels, *trained = facts.input_size
        own = trained
    else:
        try:
            facts, cfg = model_or_name.pretrained_cfg, model_or_name.cfg
        except AttributeError:
            raise DataError(
                "create_transform takes a model of tfimm_lora or its name, such as "
                f"'convnext_tiny', not {type(model_or_name).__name__}."
            ) from None
        channels, trained, own = cfg.in_channels, list(facts.input_size[1:]), list(cfg.input_size)
    # A model that was built for a size of its own stays with it.
    if use_test_size and own == trained and facts.test_input_size is not None:
        own = list(facts.test_input_size[1:])
    return facts, (channels, own[0], own[1])


def _image_size(size: int | tuple[int, ...], channels: int) -> tuple[int, int, int]:
    values = (size, size) if isinstance(size, int) else tuple(size)
    if len(values) == 2:
        values = (channels, *values)
    if len(values) != 3 or not all(isinstance(v, int) and v > 0 for v in values):
        raise DataError(
            "input_size is a number of pixels, (height, width) or (channels, height, width), "
            f"not {size!r}."
        )
    if values[0] != channels:
        raise DataError(
            f"input_size {size!r} has {values[0]} channels, and the model wants {channels}."
        )
    return values[0], values[1], values[2]


def _values(name: str, values: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    given = (values,) if isinstance(values, (int, float)) else tuple(values)
    if len(given) == 1:
        given *= channels
    if len(given) != channels:
        raise DataError(f"{name} needs 1 value or {channels}, one per channel, not {len(given)}.")
    return given
