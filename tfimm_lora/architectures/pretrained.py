"""Facts about a checkpoint: where it is and how its images were prepared."""

from __future__ import annotations

import dataclasses

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass
class PretrainedConfig:
    """What is known about one checkpoint of an architecture (timm's ``PretrainedCfg``).

    Attributes:
        architecture: The architecture's name.
        tag: The checkpoint's tag; ``arch.tag`` names the model.
        hf_hub_id: Hub repository that holds the weights, ``""`` if there is none.
        hf_hub_filename: File in that repository.
        file: Path of a local safetensors file in timm's key names, used before the hub.
        url: Address of weights that are not on the hub, in a format of their authors'.
        num_classes: Number of classes of the checkpoint's head, 0 if it has none.
        input_size: Channels, height and width of the images it was trained with.
        test_input_size: Channels, height and width of the images it does best with, ``None`` if
            these are the images it was trained with.
        fixed_input_size: Whether other sizes need a resized position table.
        mean: Per-channel mean of the images, for values in [0, 1].
        std: Per-channel standard deviation, likewise.
        interpolation: How images are resized.
        crop_pct: Side of the centre crop over the side of the resized image.
        test_crop_pct: The same at ``test_input_size``.
        crop_mode: ``center``, ``squash`` or ``border``.
        first_conv: timm path of the layer that reads the image.
        classifier: timm path of the classification layer, or a tuple of them.
        license: Licence of the weights.
        has_weights: Whether weights can be loaded for this tag.

    Example:
        >>> tfimm_lora.create_model("convnext_tiny").pretrained_cfg.mean
        (0.485, 0.456, 0.406)
    """

    architecture: str = ""
    tag: str = ""
    hf_hub_id: str = ""
    hf_hub_filename: str = "model.safetensors"
    file: str = ""
    url: str = ""
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    test_input_size: tuple[int, int, int] | None = None
    fixed_input_size: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    test_crop_pct: float | None = None
    crop_mode: str = "center"
    first_conv: str = ""
    classifier: str | tuple[str, ...] = ""
    license: str = ""
    has_weights: bool = True

    def __post_init__(self) -> None:
        self.input_size = tuple(self.input_size)  # type: ignore[assignment]
        if self.test_input_size is not None:
            self.test_input_size = tuple(self.test_input_size)  # type: ignore[assignment]
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if isinstance(self.classifier, list):  # JSON knows no tuples
            self.classifier = tuple(self.classifier)
